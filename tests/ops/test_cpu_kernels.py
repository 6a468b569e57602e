"""The compiled kernels of each instruction set: edges of shapes, strides and values.

The truth is the torch backend in float64, which other tests compare with the
reference.
"""

import functools
import math

import pytest
import torch

from mmvssm.ops import selective_scan, ss2d_scan
from mmvssm.ops.cpu import library

from .backends_under_test import on_every_isa, precision
from .scan_inputs import (
    OPTIONAL,
    as_double,
    gradients,
    relative_error,
    scan_inputs,
    ss2d_inputs,
)

_, TOLERANCE = precision('cpu')
every_isa = on_every_isa()
NAN = float('nan')


@pytest.fixture(autouse=True)
def use_isa(request):
    """Each test here runs on the instruction set of its parameter."""
    with library.use_isa(request.getfixturevalue('isa')):
        yield


def scan(inputs, backend='cpu', softplus=True):
    """Outputs and gradients of one call."""
    out, last = selective_scan(
        **inputs, delta_softplus=softplus, return_last_state=True, backend=backend
    )
    return dict(out=out, last=last, **gradients((out, last), inputs))


def assert_close(got, want, tolerance=TOLERANCE):
    errors = {name: relative_error(got[name], want[name]) for name in want}
    # A NaN is not within the tolerance either.
    wrong = {name: error for name, error in errors.items() if not error < tolerance}
    assert not wrong, wrong


def check(inputs, softplus=True):
    got = scan(inputs, softplus=softplus)
    assert_close(got, scan(as_double(inputs), 'torch', softplus))
    for name, x in inputs.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape


def float32_inputs(*shape, **options):
    return scan_inputs(*shape, dtype=torch.float32, **options)


def replaced(inputs, **others):
    """The inputs with some of them exchanged, as leaves of their own."""
    inputs = {**inputs, **others}
    return {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}


# Shapes: vectors, channel blocks and chunks that are full, and that are not


@every_isa
@pytest.mark.parametrize('states', [1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 256])
def test_states(isa, states):
    check(float32_inputs(2, 34, 70, states, 2))


@every_isa
@pytest.mark.parametrize('groups', [1, 2, 3, 4])
@pytest.mark.parametrize('channels', [1, 15, 16, 17, 48, 65, 130])
def test_channels(isa, channels, groups):
    """`channels` in each group."""
    for states in (1, 3):
        for channels_last in (False, True):
            check(
                float32_inputs(
                    *(2, channels * groups, 37, states, groups),
                    channels_last=channels_last,
                )
            )


@every_isa
@pytest.mark.parametrize('threads', [1, 3])
@pytest.mark.parametrize('states', [1, 3])
def test_bands_of_channel_blocks(isa, states, threads, set_threads):
    """Many channels in a row are scanned block by block within each chunk.

    So the bits are those of an array with positions in a row, whose blocks are scanned
    one after the other. There are more blocks than a band has, in two groups.
    """
    set_threads(threads)
    shape = (2, 2200, 70, states, 2)
    got, want = (
        scan(float32_inputs(*shape, channels_last=last)) for last in (True, False)
    )
    for name in want:
        assert torch.equal(got[name], want[name]), name


@every_isa
@pytest.mark.parametrize('length', [1, 2, 15, 31, 32, 33, 64, 100])
def test_lengths(isa, length):
    for states in (1, 4):
        for channels_last in (False, True):
            inputs = float32_inputs(
                2, 40, length, states, 2, channels_last=channels_last
            )
            check(inputs)


# Strides. Memory around a tensor is NaN, so that reading it by mistake shows.


def _inside(x, *margins):
    """Equal values inside a bigger tensor."""
    bigger = torch.full([n + 2 * m for n, m in zip(x.shape, margins)], NAN).to(x)
    inner = bigger[tuple(slice(m, m + n) for n, m in zip(x.shape, margins))]
    return inner.copy_(x.detach()).requires_grad_()


def _by(*order):
    """Equal values with the axes in this order in memory."""

    def restride(x):
        back = sorted(range(x.ndim), key=lambda axis: order[axis])
        return x.detach().permute(order).contiguous().permute(back).requires_grad_()

    return restride


# For tensors (batch, channel, position) and (batch, group, state, position).
LAYOUTS = {
    'positions last': (_by(0, 1, 2), _by(0, 1, 2, 3)),
    'channels last': (_by(0, 2, 1), _by(0, 3, 1, 2)),
    'reversed': (_by(2, 1, 0), _by(3, 2, 1, 0)),
    'batch last': (_by(1, 2, 0), _by(1, 2, 3, 0)),
    'inside': (
        lambda x: _inside(x, 1, 2, 3),
        lambda x: _inside(x, 1, 2, 3, 1),
    ),
    'columns of a matrix': (
        lambda x: _inside(x.mT, 0, 0, 5).mT,
        lambda x: _inside(x.movedim(-1, 1), 0, 0, 0, 7).movedim(1, -1),
    ),
    'every second': (
        lambda x: _inside(x[..., None], 0, 0, 0, 1)[..., 0],
        lambda x: _inside(x[..., None], 0, 0, 0, 0, 1)[..., 0],
    ),
}


@every_isa
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize(
    'shape', [(2, 40, 70, 3, 2), (3, 64, 45, 1, 1), (2, 32, 33, 16, 1)]
)
def test_strides(isa, layout, shape):
    inputs = float32_inputs(*shape)
    double = as_double(inputs)
    sequence, weights = LAYOUTS[layout]
    for name in ('u', 'delta', 'z'):
        inputs[name] = sequence(inputs[name])
    for name in ('B', 'C'):
        inputs[name] = weights(inputs[name])
    for name in ('A', 'D', 'delta_bias'):
        inputs[name] = _inside(inputs[name], *[1] * inputs[name].ndim)
    want = selective_scan(**double, delta_softplus=True, backend='torch')
    out = selective_scan(**inputs, delta_softplus=True, backend='cpu')
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(out, list(inputs.values()), sequence(grad))
    want_grads = torch.autograd.grad(want, list(double.values()), grad.double())
    assert_close(
        dict(zip(['out', *inputs], (out, *got))),
        dict(zip(['out', *inputs], (want, *want_grads))),
    )


@every_isa
def test_expanded(isa):
    """Expanded inputs, and the expanded gradient of a sum."""
    inputs = float32_inputs(2, 34, 40, 3, 2)
    inputs['delta'] = inputs['delta'].detach()[:, :1].clone().requires_grad_()
    inputs['B'] = inputs['B'].detach()[:1].clone().requires_grad_()
    inputs['z'] = inputs['z'].detach()[..., :1].clone().requires_grad_()

    def grads(leaves, backend):
        full = dict(leaves)
        for name in ('delta', 'z'):
            full[name] = full[name].expand_as(full['u'])
        full['B'] = full['B'].expand_as(full['C'])
        out = selective_scan(**full, delta_softplus=True, backend=backend)
        return dict(zip(leaves, torch.autograd.grad(out.sum(), list(leaves.values()))))

    assert_close(grads(inputs, 'cpu'), grads(as_double(inputs), 'torch'))


@every_isa
@pytest.mark.parametrize('which', [0, 1])
def test_gradient_of_one_output_only(isa, which):
    inputs = float32_inputs(2, 20, 70, 3, 2, optional=())

    def grads(leaves, backend):
        outputs = selective_scan(**leaves, return_last_state=True, backend=backend)
        return gradients((outputs[which],), leaves)

    delta = 0.1 * inputs['delta'].detach().abs()
    inputs = replaced(inputs, delta=delta)
    got, want = grads(inputs, 'cpu'), grads(as_double(inputs), 'torch')
    assert bool(want['C'].any()) == (which == 0)
    assert_close(got, want)


# Dtypes


@every_isa
@pytest.mark.parametrize('layout', ['positions last', 'channels last'])
@pytest.mark.parametrize('shape', [(2, 64, 70, 1, 1), (2, 34, 45, 3, 2)])
def test_bfloat16_is_a_format_of_memory(isa, shape, layout):
    """Bit for bit what float32 gives for the same values, rounded once."""
    exact = {}
    for name, x in float32_inputs(*shape).items():
        restride = LAYOUTS[layout][x.ndim == 4] if x.ndim > 2 else _by(*range(x.ndim))
        exact[name] = restride(x.to(torch.bfloat16).float())
    halves = {
        name: x.detach().to(torch.bfloat16).requires_grad_()
        for name, x in exact.items()
    }
    results = []
    for inputs in (exact, halves):
        out, last = selective_scan(
            **inputs, delta_softplus=True, return_last_state=True, backend='cpu'
        )
        grad = out.detach().to(torch.bfloat16).to(out.dtype)
        got = torch.autograd.grad((out, last), list(inputs.values()), (grad, last))
        results.append(dict(zip(['out', 'last', *inputs], (out, last, *got))))
    want, got = results
    for name, x in got.items():
        assert x.dtype == (torch.float32 if name == 'last' else torch.bfloat16)
        assert torch.equal(x, want[name].to(x.dtype)), name
    with torch.autocast('cpu', torch.bfloat16):
        out = selective_scan(**halves, delta_softplus=True, backend='cpu')
    assert torch.equal(out, want['out'])


@every_isa
@pytest.mark.parametrize('layout', ['positions last', 'channels last'])
def test_bfloat16_rounds_to_nearest_even(isa, layout):
    """Many of the products lie halfway between two numbers; some are too large."""
    inputs = float32_inputs(1, 67, 200, 1, 1, optional=('D',), requires_grad=False)
    u = inputs['u'].bfloat16()
    u[..., 0] = torch.finfo(torch.bfloat16).max
    D = torch.full_like(inputs['D'], 1 + 5 / 128)
    inputs.update(
        u=LAYOUTS[layout][0](u),
        D=D,
        delta=torch.zeros_like(inputs['delta']),
    )
    want = (u.float() * D[:, None]).bfloat16()
    got = selective_scan(**inputs, backend='cpu')
    assert torch.equal(got, want) and want[..., 0].isinf().all()


@every_isa
@pytest.mark.parametrize('activations', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    'dtypes',
    [
        dict(B=torch.bfloat16, C=torch.float16, A=torch.float64),
        dict(delta=torch.bfloat16, z=torch.float16, D=torch.bfloat16),
        dict(delta=torch.float64, z=torch.bfloat16, delta_bias=torch.float16),
        dict(B=torch.float64, C=torch.float32, delta=torch.float32, z=torch.float32),
    ],
)
def test_every_input_has_its_dtype(isa, dtypes, activations):
    inputs = float32_inputs(2, 34, 70, 3, 2)
    for name, dtype in {'u': activations, **dtypes}.items():
        inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
    got, want = scan(inputs), scan(as_double(inputs), 'torch')
    assert got['out'].dtype == activations
    for name in want:
        dtype = got[name].dtype
        assert name not in inputs or dtype == inputs[name].dtype
        # Only the rounding of the formats is allowed for.
        rounding = max(torch.finfo(dtype).eps, torch.finfo(activations).eps / 2)
        assert relative_error(got[name], want[name]) < TOLERANCE + rounding, name


# Elementary functions, read off a scan that has one channel for each number


def _relative(got, want):
    return ((got.double() - want) / want).abs()


def _read_off(x, **arguments):
    """The output at the last position of a scan; what is not given is one."""
    one = torch.ones(1, *x.shape)
    weights = torch.ones(1, 1, x.shape[1])
    arguments = dict(u=one, delta=one, B=weights, C=weights) | arguments
    A = arguments.pop('A', -torch.ones(x.shape[0], 1))
    return selective_scan(A=A, **arguments, backend='cpu')[0, :, -1]


@every_isa
def test_softplus_and_its_slope(isa):
    x = torch.linspace(-80, 88, 4001)[:, None].requires_grad_()
    got = _read_off(x, delta=x[None], delta_softplus=True)
    exact = x.detach().double()[:, 0].requires_grad_()
    want = exact.clamp(min=0) + torch.log1p(torch.exp(-exact.abs()))
    assert _relative(got, want).max() < 5e-7
    (slope,) = torch.autograd.grad(got.sum(), x)
    assert _relative(slope[:, 0], torch.sigmoid(exact)).max() < 5e-7


@every_isa
def test_silu(isa):
    x = torch.linspace(-80, 88, 4001)[:, None].requires_grad_()
    got = _read_off(x, z=x[None])
    exact = x.detach().double()[:, 0].requires_grad_()
    want = torch.nn.functional.silu(exact)
    # exp turns an absolute error of its argument into a relative one.
    bound = 3e-7 + 1.2e-7 * exact.detach().abs()
    assert (_relative(got, want) < bound).all()
    (slope,) = torch.autograd.grad(got.sum(), x)
    (want_slope,) = torch.autograd.grad(want.sum(), exact)
    scale = want_slope.abs() + want.detach().abs() / (1 + exact.detach().abs())
    error = (slope[:, 0].double() - want_slope).abs() / scale
    assert (error < bound).all()


@every_isa
def test_exponential(isa):
    """The decay of a state of one, beside faster and slower decays."""
    exponents = torch.linspace(-80, 80, 4001)
    for x in (exponents, exponents / 1000, exponents / 1e6):
        start = torch.ones(1, x.numel(), 2)
        start[..., 1] = 0
        got = _read_off(start[0], u=start, A=x[:, None])
        want = torch.exp(x.double())
        assert (_relative(got, want) < 3e-7 + 1.2e-7 * x.abs()).all()


# Extreme values


@every_isa
def test_negative_dt(isa):
    """Without softplus dt may be negative: the state grows."""
    inputs = float32_inputs(2, 34, 100, 3, 2)
    delta = 0.1 * inputs['delta'].detach()
    bias = 0.1 * inputs['delta_bias'].detach()
    check(replaced(inputs, delta=delta, delta_bias=bias), softplus=False)


def _log_uniform(shape, low, high):
    generator = torch.Generator().manual_seed(2)
    exponent = torch.rand(shape, generator=generator, dtype=torch.float64)
    return low * torch.exp(exponent * math.log(high / low))


DTS = {'from 1e-6 to 50': None, '1e-6': 1e-6, '1e-3': 1e-3, '50': 50.0}


@functools.cache
def _long_inputs(dts, rates, states, softplus):
    """Inputs of 64,000 positions, and the results in float64."""
    inputs = float32_inputs(1, 6, 64000, states, 2, optional=('D', 'z'))
    shape = inputs['delta'].shape
    if DTS[dts] is None:
        delta = _log_uniform(shape, 1e-6, 50)
    else:
        delta = torch.full(shape, DTS[dts], dtype=torch.float64)
    if softplus:
        delta = delta + torch.log(-torch.expm1(-delta))
    inputs = replaced(inputs, delta=delta.float())
    if rates == 'down to -1e4':
        A = -_log_uniform(inputs['A'].shape, 1e-4, 1e4)
        inputs = replaced(inputs, A=A.float())
    return inputs, scan(as_double(inputs), 'torch', softplus)


@every_isa
@pytest.mark.parametrize('softplus', [False, True])
@pytest.mark.parametrize('states', [1, 4])
@pytest.mark.parametrize('rates', ['around -1', 'down to -1e4'])
@pytest.mark.parametrize('dts', DTS)
def test_long_and_extreme(isa, dts, rates, states, softplus):
    inputs, want = _long_inputs(dts, rates, states, softplus)
    assert_close(scan(inputs, softplus=softplus), want)


@every_isa
@pytest.mark.parametrize('states', [1, 3, 16])
def test_underflow_of_a_decay(isa, states):
    """exp(-5e5) is 0: the state is exactly what the last position added."""
    inputs = float32_inputs(2, 34, 100, states, 1, optional=())
    inputs = replaced(
        inputs,
        delta=torch.full_like(inputs['delta'], 50.0),
        A=torch.full_like(inputs['A'], -1e4),
    )
    got = scan(inputs, softplus=False)
    added = (50 * inputs['u'])[:, :, None] * inputs['B'][:, 0, None]
    assert torch.equal(got['last'], added[..., -1])
    assert not got['A'].any()
    assert_close(got, {**scan(as_double(inputs), 'torch', False), 'A': got['A']})


@every_isa
@pytest.mark.parametrize('rate', [-1.0, -0.1])
def test_underflow_of_the_state(isa, rate):
    """A state that decays below the smallest number."""
    inputs = float32_inputs(1, 34, 3000, 2, 1, optional=())
    u = torch.zeros_like(inputs['u'])
    u[..., 0] = 1e-30
    inputs = replaced(
        inputs,
        u=u,
        delta=torch.ones_like(inputs['delta']),
        A=torch.full_like(inputs['A'], rate),
    )
    got = scan(inputs, softplus=False)
    want = scan(as_double(inputs), 'torch', False)
    faded = got['out'][..., 2000:].abs().max()
    # A subnormal number that shrinks by a tenth rounds to itself.
    assert faded == 0 if rate == -1 else faded < 1e-40
    assert_close(got, {name: want[name] for name in ('out', 'u', 'delta', 'A')})


@every_isa
@pytest.mark.parametrize('name', ['u', 'delta'])
def test_huge_values(isa, name):
    inputs = float32_inputs(2, 34, 70, 3, 2)
    huge = inputs[name].detach().clone()
    huge[..., 40] *= 1e30
    inputs = replaced(inputs, **{name: huge})
    got, want = scan(inputs), scan(as_double(inputs), 'torch')
    assert_close(got, want)
    before = slice(0, 40)
    assert_close(
        {'out': got['out'][..., before], 'delta': got['delta'][..., before]},
        {'out': want['out'][..., before], 'delta': want['delta'][..., before]},
    )


@every_isa
@pytest.mark.parametrize('states', [1, 3])
@pytest.mark.parametrize('name', ['u', 'delta', 'z'])
def test_infinity_goes_no_further_than_it_must(isa, name, states):
    """It does not count as NaN; other channels and earlier positions stay right."""
    inputs = float32_inputs(2, 34, 70, states, 2, requires_grad=False)
    spoilt = dict(inputs, **{name: inputs[name].clone()})
    spoilt[name][1, 20, 40] = float('inf')
    want, got = (
        selective_scan(**x, delta_softplus=True, backend='cpu')
        for x in (inputs, spoilt)
    )
    assert not got[1, 20, 40].isfinite()
    touched = torch.zeros(got.shape, dtype=torch.bool)
    touched[1, 20, 40:] = True
    # Its register block may take other code for the decays, which rounds differently.
    torch.testing.assert_close(got[~touched], want[~touched])


@every_isa
@pytest.mark.parametrize('name', ['u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias'])
def test_nan_is_found(isa, name):
    """In the last value of each input, next to the padding of vectors and blocks."""
    for shape in ((2, 17, 33, 5, 1), (1, 64, 32, 1, 1), (1, 20, 1, 40, 1)):
        for optional in (OPTIONAL, (name,) if name in OPTIONAL else ()):
            inputs = float32_inputs(*shape, optional=optional, requires_grad=False)
            inputs[name][(-1,) * inputs[name].ndim] = NAN
            with pytest.raises(ValueError, match=f'1 of .* values of {name} are NaN'):
                selective_scan(**inputs, delta_softplus=True, backend='cpu')


# The fused scan of maps


@every_isa
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize(
    'batch,channels,height,width,rank,states',
    [
        (2, 6, 4, 5, 2, 1),
        (1, 17, 1, 40, 1, 3),
        (2, 64, 33, 2, 3, 1),
        (1, 130, 9, 13, 5, 2),
        (2, 70, 7, 1, 17, 8),
        (1, 15, 16, 16, 2, 17),
        (1, 96, 32, 32, 6, 1),
        (2, 1, 5, 7, 1, 1),
        (1, 192, 14, 14, 12, 16),
    ],
)
def test_maps(isa, batch, channels, height, width, rank, states, channels_last):
    inputs = ss2d_inputs(
        *(batch, channels, height, width, rank, states),
        dtype=torch.float32,
        channels_last=channels_last,
    )
    results = []
    for backend, leaves in (('torch', as_double(inputs)), ('cpu', inputs)):
        y = ss2d_scan(**leaves, backend=backend)
        results.append(dict(y=y, **gradients((y,), leaves)))
    want, got = results
    assert_close(got, want)


@every_isa
@pytest.mark.parametrize('name', ['x', 'x_proj_weight', 'dt_projs_bias', 'A', 'Ds'])
def test_nan_in_a_map_is_found(isa, name):
    inputs = ss2d_inputs(1, 17, 5, 9, 2, 3, dtype=torch.float32)
    inputs = {key: x.detach() for key, x in inputs.items()}
    inputs[name][(-1,) * inputs[name].ndim] = NAN
    with pytest.raises(ValueError, match=r'ss2d_scan: .* are NaN'):
        ss2d_scan(**inputs, backend='cpu')
