"""The compiled kernels of linear attention: each instruction set, at every edge."""

import pytest
import torch

from mmvssm.ops import linear_attention
from mmvssm.ops.cpu import library

from .attention_inputs import make_inputs, make_tables
from .backends_under_test import on_every_isa, precision
from .scan_inputs import as_double, relative_error

_, TOLERANCE = precision('cpu')
NAN = float('nan')
every_isa = on_every_isa()


@pytest.fixture(autouse=True)
def use_isa(request):
    """Each test here runs on the instruction set of its parameter."""
    with library.use_isa(request.getfixturevalue('isa')):
        yield


def results(inputs, rotary, backend='cpu', *, by=None, **options):
    """Output and gradients by name; ``by`` restrides the output's gradient."""
    if rotary is not None:
        rotary = [x.to(inputs['q'].dtype) for x in rotary]
    y = linear_attention(**inputs, rotary=rotary, backend=backend, **options)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    grads = torch.autograd.grad(
        y, list(inputs.values()), grad if by is None else by(grad)
    )
    return {'y': y, **dict(zip(inputs, grads))}


def check(inputs, rotary, by=None, **options):
    got = results(inputs, rotary, by=by, **options)
    want = results(as_double(inputs), rotary, 'reference', **options)
    # Of a single position, or with a single channel, hardly anything but v matters.
    noise = TOLERANCE * want['v'].norm()
    for name, x in want.items():
        small = noise if name in 'qk' else 0
        difference = (got[name].double() - x).norm()
        # A NaN is not within the tolerance either.
        assert difference < TOLERANCE * x.norm() + small, name
        assert name == 'y' or got[name].dtype == inputs[name].dtype


# Shapes: panels, blocks and splits that are full, and that are not


@every_isa
@pytest.mark.parametrize('normalise', [True, False])
@pytest.mark.parametrize('length', [1, 7, 31, 32, 33, 128, 129, 300])
def test_lengths(isa, length, normalise):
    for heads, keys, values in ((2, 32, 32), (1, 6, 40)):
        inputs = make_inputs(2, length, heads, keys, values)
        check(inputs, make_tables(inputs), heads=heads, normalise=normalise)


@every_isa
@pytest.mark.parametrize('rotated', [True, False])
@pytest.mark.parametrize(
    'keys, values',
    [(2, 1), (2, 32), (8, 16), (14, 5), (16, 33), (30, 64), (32, 96)]
    + [(34, 31), (48, 32), (64, 64), (66, 7), (160, 130)],
)
def test_channels(isa, keys, values, rotated):
    for heads in (1, 3):
        inputs = make_inputs(2, 70, heads, keys, values)
        check(inputs, make_tables(inputs) if rotated else None, heads=heads)


@every_isa
@pytest.mark.parametrize('keys', [1, 15, 33])
def test_odd_channels(isa, keys):
    check(make_inputs(2, 40, 2, keys, 3), None, heads=2)


@every_isa
def test_splits_of_wide_heads(isa):
    """Their splits are longer than those of others."""
    inputs = make_inputs(1, 700, 1, 128, 128)
    check(inputs, make_tables(inputs))


# Strides. Memory around a tensor is NaN, so that reading it by mistake shows.


def _inside(x):
    bigger = torch.full([n + 3 for n in x.shape], NAN).to(x)
    inner = bigger[tuple(slice(1, n + 1) for n in x.shape)]
    return inner.copy_(x.detach()).requires_grad_()


def _restrided(order):
    def restride(x):
        back = sorted(range(x.ndim), key=lambda axis: order[axis])
        return x.detach().permute(order).contiguous().permute(back).requires_grad_()

    return restride


LAYOUTS = {
    'inside': _inside,
    'channels first': _restrided((0, 2, 1)),
    'positions first': _restrided((1, 0, 2)),
    'every second': lambda x: _inside(x[..., None].expand(*x.shape, 2))[..., 0],
}


@every_isa
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('keys, values', [(32, 32), (6, 40)])
def test_strides(isa, keys, values, layout, dtype):
    inputs = make_inputs(2, 45, 2, keys, values, dtype=dtype)
    rotary = make_tables(inputs)
    want = results(inputs, rotary, heads=2)
    restride = LAYOUTS[layout]
    inputs = {name: restride(x) for name, x in inputs.items()}
    tables = [_inside(x).detach() for x in rotary]
    got = results(inputs, tables, heads=2, by=restride)
    for name, x in want.items():
        assert torch.equal(got[name], x), name


@every_isa
def test_expanded(isa):
    """Expanded inputs, and the expanded gradient of a sum."""

    def grads(leaves, backend):
        full = dict(leaves)
        full['q'] = full['q'].expand_as(full['k'])
        y = linear_attention(**full, heads=2, backend=backend)
        return torch.autograd.grad(y.sum(), list(leaves.values()))

    inputs = make_inputs(2, 40, 2, 16, 8)
    inputs['q'] = inputs['q'].detach()[:, :1].clone().requires_grad_()
    for got, want in zip(grads(inputs, 'cpu'), grads(as_double(inputs), 'torch')):
        assert relative_error(got, want) < TOLERANCE


# Dtypes


@every_isa
@pytest.mark.parametrize('keys, values', [(32, 32), (6, 40)])
def test_bfloat16_is_a_format_of_memory(isa, keys, values):
    """Bit for bit what float32 gives for the same values, rounded once."""
    halves = make_inputs(2, 150, 2, keys, values, dtype=torch.bfloat16)
    exact = {name: x.detach().float().requires_grad_() for name, x in halves.items()}
    found = []
    for inputs in (halves, exact):
        rotary = make_tables(exact)
        y = linear_attention(**inputs, heads=2, rotary=rotary, backend='cpu')
        grad = torch.linspace(-1, 1, y.numel()).bfloat16().view_as(y).to(y.dtype)
        got = torch.autograd.grad(y, list(inputs.values()), grad)
        found.append(dict(zip(['y', *inputs], (y, *got))))
    for name, x in found[0].items():
        assert x.dtype == torch.bfloat16
        assert torch.equal(x, found[1][name].bfloat16()), name


@every_isa
def test_every_input_has_its_dtype(isa):
    inputs = make_inputs(1, 70, 2, 32, 32)
    for name, dtype in dict(q=torch.bfloat16, k=torch.float16).items():
        inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
    got = results(inputs, None, heads=2)
    want = results(as_double(inputs), None, 'reference', heads=2)
    for name, x in want.items():
        rounding = torch.finfo(got[name].dtype).eps
        assert relative_error(got[name], x) < TOLERANCE + rounding, name


# Values


@every_isa
def test_features_and_their_slope(isa):
    """Read off heads of one position and one channel, which have nothing else."""
    x = torch.linspace(-87, 87, 4001)[:, None, None].requires_grad_()
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    got = linear_attention(x, zero, one, normalise=False, backend='cpu')
    want = torch.where(x > 0, x.double() + 1, x.double().exp())
    assert ((got - want) / want).abs().max() < 3e-7
    (slope,) = torch.autograd.grad(got.sum(), x)
    want = x.detach().double().clamp(max=0).exp()
    assert ((slope - want) / want).abs().max() < 3e-7


@every_isa
def test_features_of_the_largest_numbers(isa):
    most = torch.finfo(torch.float32).max
    x = torch.tensor([-float('inf'), -most, -120.0, -0.0, most, float('inf')])
    x = x[:, None, None]
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    got = linear_attention(x, zero, one, normalise=False, backend='cpu')
    want = torch.tensor([0.0, 0.0, 0.0, 1.0, most, float('inf')])
    assert torch.equal(got.flatten(), want)


@every_isa
@pytest.mark.parametrize('name', 'qkv')
def test_nan_stays_where_it_is(isa, name):
    """In its position if a query has it, else in the head."""
    inputs = make_inputs(2, 70, 3, 8, 8)
    clean = linear_attention(**inputs, heads=3, backend='cpu')
    with torch.no_grad():
        inputs[name][1, 40, 9] = NAN
    got = linear_attention(**inputs, heads=3, backend='cpu').isnan()
    want = torch.zeros_like(clean, dtype=torch.bool)
    positions = slice(40, 41) if name == 'q' else slice(None)
    want[1, positions, 9 if name == 'v' else slice(8, 16)] = True
    assert torch.equal(got, want)


# The same bits


@every_isa
@pytest.mark.parametrize(
    'sizes', [(1, 300, 2, 32, 32), (3, 49, 5, 32, 8), (1, 500, 1, 32, 96)]
)
def test_any_number_of_threads(isa, sizes, set_threads):
    inputs = make_inputs(*sizes)
    found = []
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        found.append(results(inputs, make_tables(inputs), heads=sizes[2]))
    for got in found[1:]:
        for name, x in found[0].items():
            assert torch.equal(got[name], x), name
