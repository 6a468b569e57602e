import itertools

import pytest
import torch

from mmvssm.ops import BackendUnavailableError, selective_scan

from .backends_under_test import (
    BACKENDS,
    FAST_BACKENDS,
    on,
    on_backends,
    precision,
    takes,
)
from .scan_inputs import OPTIONAL, as_double, gradients, relative_error, scan_inputs

backends = on_backends(*FAST_BACKENDS)
all_backends = on_backends(*BACKENDS)
SUBSETS = [s for n in range(4) for s in itertools.combinations(OPTIONAL, n)]


def compare_with_reference(inputs, backend, softplus=True):
    """Outputs and gradients, with those of the reference in float64."""
    results = []
    for name, args in (('reference', as_double(inputs)), (backend, inputs)):
        out, last = selective_scan(
            **args, delta_softplus=softplus, return_last_state=True, backend=name
        )
        results.append(dict(out=out, last=last, **gradients((out, last), args)))
    want, got = results
    errors = {key: relative_error(got[key], want[key]) for key in want}
    assert max(errors.values()) < precision(backend)[1], errors
    for name, x in inputs.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape


def test_reference_is_the_recurrence():
    """One channel, one state, by hand."""
    u, delta = torch.tensor([[[2.0, 3.0]]]), torch.tensor([[[0.5, 1.0]]])
    one = torch.ones(1, 1, 2)
    out, last = selective_scan(
        u,
        delta,
        torch.tensor([[-1.0]]),
        3 * one,
        5 * one,
        torch.tensor([7.0]),
        return_last_state=True,
        backend='reference',
    )
    h1 = 0.5 * 3 * 2
    h2 = h1 * torch.exp(torch.tensor(-1.0)) + 1 * 3 * 3
    torch.testing.assert_close(out, torch.tensor([[[5 * h1 + 7 * 2, 5 * h2 + 7 * 3]]]))
    torch.testing.assert_close(last, h2.reshape(1, 1, 1))


@all_backends
@pytest.mark.parametrize('states', [1, 4])
def test_constant_parameters_are_a_convolution(backend, states):
    """Equation (4) of arXiv 2401.09417: the kernel is (CB, CAB, CA²B, ...)."""
    length = 37
    inputs = scan_inputs(2, 3, length, states, optional=(), requires_grad=False)
    for name in ('delta', 'B', 'C'):
        inputs[name] = inputs[name][..., :1].expand_as(inputs[name])
    u, delta, A, B, C = (x.double() for x in inputs.values())
    dt = torch.nn.functional.softplus(delta[:, :, 0])  # (B, D)
    A_bar = torch.exp(dt[:, :, None] * A)  # (B, D, N)
    B_bar = dt[:, :, None] * B[:, None, :, 0]
    power, kernel = torch.ones_like(A_bar), []
    for _ in range(length):
        kernel.append((C[:, None, :, 0] * power * B_bar).sum(-1))
        power = power * A_bar
    # torch's convolution multiplies by the kernel from its end.
    weight = torch.stack(kernel, -1).flatten(0, 1).flip(-1).unsqueeze(1)
    padded = torch.nn.functional.pad(u.reshape(1, -1, length), (length - 1, 0))
    want = torch.nn.functional.conv1d(padded, weight, groups=len(weight)).view_as(u)
    dtype = precision(backend)[0]
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    got = selective_scan(**inputs, delta_softplus=True, backend=backend)
    assert relative_error(got.double(), want) < precision(backend)[1]


@backends
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize(
    'batch,channels,length,states,groups',
    [
        (2, 12, 67, 3, 4),
        (1, 8, 197, 16, 1),
        (2, 6, 130, 4, None),
        (1, 2, 1, 1, 2),
        (2, 4, 2, 5, 1),
        (3, 4, 17, 1, 4),
    ],
)
def test_matches_reference(
    backend, batch, channels, length, states, groups, channels_last
):
    inputs = scan_inputs(
        *(batch, channels, length, states, groups),
        dtype=precision(backend)[0],
        channels_last=channels_last,
    )
    compare_with_reference(inputs, backend)


@backends
@pytest.mark.parametrize('softplus', [False, True])
@pytest.mark.parametrize('optional', SUBSETS, ids='-'.join)
def test_every_option(backend, optional, softplus):
    dtype, _ = precision(backend)
    inputs = scan_inputs(2, 6, 23, 2, 3, optional=optional, dtype=dtype)
    for name in inputs.keys() & {'delta', 'delta_bias'}:
        # Steps without softplus are positive, too.
        inputs[name] = (inputs[name].detach().abs() * 0.3).requires_grad_()
    compare_with_reference(inputs, backend, softplus)


@backends
@pytest.mark.parametrize('shape', [(2, 4, 5000, 32, 2), (1, 2, 150000, 1, 1)])
def test_long_sequences(backend, shape):
    """Cut in two with the state carried over by hand, outputs and gradients.

    So long that the torch backend works in several chunks.
    """
    dtype, tolerance = precision(backend)
    inputs = scan_inputs(*shape, dtype=dtype)
    cut = shape[2] // 3

    def piece(positions):
        along = ('u', 'delta', 'z', 'B', 'C')
        return {
            name: x[..., positions] if name in along else x
            for name, x in inputs.items()
        }

    def scan(arguments):
        return selective_scan(
            **arguments, delta_softplus=True, return_last_state=True, backend=backend
        )

    out, last = scan(inputs)
    first, state = scan(piece(slice(0, cut)))
    second = piece(slice(cut, None))
    rest, rest_state = scan(second)
    # A start state adds C_t exp(A sum of steps) h_0 to the outputs; in float64.
    steps = torch.nn.functional.softplus(
        second['delta'].double() + inputs['delta_bias'].double()[:, None]
    ).cumsum(-1)
    groups = shape[4]
    decay = torch.exp(steps[:, :, None] * inputs['A'].double()[:, :, None])
    weights = second['C'].double().repeat_interleave(shape[1] // groups, 1)
    added = (weights * decay * state.double()[..., None]).sum(2)
    rest = rest + added * torch.nn.functional.silu(second['z'].double())
    rest_state = rest_state + decay[..., -1] * state

    whole = torch.cat((first, rest), -1)
    assert relative_error(out, whole) < tolerance
    assert relative_error(last, rest_state) < tolerance
    got, want = gradients((out, last), inputs), gradients((whole, rest_state), inputs)
    # Sums of steps this long lose digits of float64.
    tolerance = max(tolerance, 1e-10)
    for name in inputs:
        assert relative_error(got[name], want[name]) < tolerance, name


# Finite differences say nothing in float32.
@on_backends(*(b for b in FAST_BACKENDS if takes(b, torch.float64)))
def test_gradcheck(backend):
    inputs = scan_inputs(1, 4, 9, 2, 2)
    names = list(inputs)

    def scan(*args):
        return selective_scan(
            **dict(zip(names, args)),
            delta_softplus=True,
            return_last_state=True,
            backend=backend,
        )

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


@backends
def test_gradient_of_one_input_only(backend):
    dtype, tolerance = precision(backend)
    inputs = scan_inputs(1, 4, 30, 2, dtype=dtype, requires_grad=False)
    inputs['A'].requires_grad_()
    double = as_double(inputs)
    for name in ('reference', backend):
        args = double if name == 'reference' else inputs
        selective_scan(**args, delta_softplus=True, backend=name).sum().backward()
    assert relative_error(inputs['A'].grad, double['A'].grad) < tolerance
    assert all(x.grad is None for name, x in inputs.items() if name != 'A')


@pytest.mark.parametrize(
    'backend,dtype',
    [
        on(backend, dtype)
        for backend in BACKENDS
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if takes(backend, dtype)
    ],
)
def test_low_precision_keeps_a_float32_state(backend, dtype):
    inputs = scan_inputs(2, 8, 300, 4, 2, dtype=dtype)
    inputs['A'] = inputs['A'].detach().float().requires_grad_()
    out, last = selective_scan(
        **inputs, delta_softplus=True, return_last_state=True, backend=backend
    )
    assert out.dtype == dtype and last.dtype == torch.float32
    double = as_double(inputs)
    want, want_last = selective_scan(
        **double, delta_softplus=True, return_last_state=True, backend='reference'
    )
    assert relative_error(last, want_last) < 1e-6
    # Only the final rounding of the output is in the low precision.
    assert relative_error(out, want) < 1e-6 + torch.finfo(dtype).eps
    got, want = gradients((out,), inputs), gradients((want,), double)
    for name, x in inputs.items():
        assert got[name].dtype == x.dtype
        assert relative_error(got[name], want[name]) < 2e-6 + 2 * torch.finfo(dtype).eps


@all_backends
def test_autocast_returns_float32(backend):
    inputs = scan_inputs(1, 4, 20, 2, dtype=torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16):
        out = selective_scan(**inputs, delta_softplus=True, backend=backend)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert inputs['u'].grad.dtype == torch.bfloat16


@all_backends
@pytest.mark.parametrize(
    'decay,step',
    [(-1e4, 50.0), (-1e-6, 1e-6), (-1.0, 50.0), (-1e4, 1e-6), (-30.0, 3.0)],
)
def test_extreme_decays(backend, decay, step):
    """No A and no Δ overflows; underflow gives zeros."""
    inputs = scan_inputs(1, 4, 300, 4, optional=(), dtype=torch.float32)
    inputs['A'] = torch.full_like(inputs['A'], decay).requires_grad_()
    inputs['delta'] = torch.full_like(inputs['delta'], step).requires_grad_()
    out = selective_scan(**inputs, backend=backend)
    grads = gradients((out,), inputs)
    double = as_double(inputs)
    want = selective_scan(**double, backend='reference')
    want_grads = gradients((want,), double)
    assert relative_error(out, want) < 2e-6
    for name in inputs:
        scale = want_grads[name].norm()
        assert torch.isfinite(grads[name]).all()
        if scale > 1e-30:
            assert relative_error(grads[name], want_grads[name]) < 5e-6, name


@backends
def test_growth_from_a_zero_state(backend):
    """A positive A may overflow a product of decays, not a state of zero."""
    inputs = scan_inputs(1, 2, 400, 1, optional=(), dtype=torch.float32)
    inputs = {k: v.detach() for k, v in inputs.items()}
    inputs['A'].fill_(40.0)
    inputs['delta'].fill_(1.0)
    inputs['u'].zero_()
    out = selective_scan(**inputs, backend=backend)
    assert torch.equal(out, torch.zeros_like(out))


@backends
def test_output_has_the_strides_of_u(backend):
    dtype, _ = precision(backend)
    for channels_last in (False, True):
        inputs = scan_inputs(2, 4, 10, 1, dtype=dtype, channels_last=channels_last)
        out = selective_scan(**inputs, backend=backend)
        assert out.stride() == inputs['u'].stride()


@backends
def test_any_strides(backend):
    dtype, tolerance = precision(backend)
    inputs = scan_inputs(2, 8, 40, 2, dtype=dtype, requires_grad=False)
    double = as_double(inputs)
    want = selective_scan(**double, delta_softplus=True, backend='reference')
    strided = dict(inputs)
    strided['u'] = torch.stack([inputs['u']] * 2, -1)[..., 0]
    strided['delta'] = inputs['delta'].flip(2).contiguous().flip(2)
    strided['B'] = inputs['B'].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    got = selective_scan(**strided, delta_softplus=True, backend=backend)
    assert relative_error(got, want) < tolerance


@backends
def test_gradients_have_the_strides_of_the_inputs(backend):
    """As the fake implementation says: inductor relies on it."""
    inputs = scan_inputs(2, 4, 40, 2, 2, dtype=precision(backend)[0])
    inputs = {name: _transposed(x) for name, x in inputs.items()}
    out = selective_scan(**inputs, delta_softplus=True, backend=backend)
    for name, grad in gradients((out,), inputs).items():
        assert grad.stride() == inputs[name].stride(), name


@backends
def test_no_state_of_every_position_is_kept(backend):
    """What autograd keeps beside the inputs is far below (B, D, L, N)."""
    inputs = scan_inputs(2, 64, 2048, 16, dtype=torch.float32)
    out = selective_scan(**inputs, delta_softplus=True, backend=backend)
    own = {x.untyped_storage().data_ptr() for x in inputs.values()}
    kept = sum(
        x.numel()
        for x in out.grad_fn.saved_tensors
        if x is not None and x.untyped_storage().data_ptr() not in own
    )
    assert kept <= 2 * 64 * 2048 * 16 / 16


@backends
@pytest.mark.parametrize('autocast', [False, True])
def test_compile_fullgraph(backend, autocast):
    inputs = scan_inputs(2, 4, 50, 2, 2, dtype=torch.float32)
    names = list(inputs)

    def scan(*args):
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            y = selective_scan(
                **dict(zip(names, args)), delta_softplus=True, backend=backend
            )
        return y * 2

    torch._dynamo.reset()
    compiled = torch.compile(scan, fullgraph=True, backend='aot_eager')
    outs = [f(*inputs.values()) for f in (scan, compiled)]
    assert torch.equal(*outs)
    for a, b in zip(*(gradients((out,), inputs).values() for out in outs)):
        assert torch.equal(a, b)


BAD = {
    'u must be': lambda i: i.update(u=i['u'][0]),
    'A must be': lambda i: i.update(A=i['A'][:3]),
    'must have u': lambda i: i.update(delta=i['delta'][..., :-1]),
    'z must have': lambda i: i.update(z=i['z'][:1]),
    'one shape': lambda i: i.update(C=i['C'][..., :-1]),
    r'\(batch, states, length\)': lambda i: i.update(
        B=i['B'][..., :-1], C=i['C'][..., :-1]
    ),
    'do not divide': lambda i: i.update(
        B=i['B'][:, :1].repeat(1, 4, 1, 1), C=i['C'][:, :1].repeat(1, 4, 1, 1)
    ),
    'D must be': lambda i: i.update(D=i['D'][:-1]),
    'delta_bias must be': lambda i: i.update(delta_bias=i['delta_bias'][None]),
    'nothing to scan': lambda i: i.update(
        {k: i[k][..., :0] for k in ('u', 'delta', 'z', 'B', 'C')}
    ),
    'is on meta': lambda i: i.update(z=i['z'].to('meta')),
}


@pytest.mark.parametrize('message', BAD)
def test_bad_shapes(message):
    inputs = scan_inputs(2, 6, 5, 2, 3, requires_grad=False)
    BAD[message](inputs)
    with pytest.raises(ValueError, match=message):
        selective_scan(**inputs)


@pytest.mark.parametrize(
    'name,value', [('u', [1.0, 2.0]), ('A', 'complex'), ('B', 'int')]
)
def test_bad_types(name, value):
    inputs = scan_inputs(2, 6, 5, 2, requires_grad=False)
    casts = {'complex': lambda x: x.to(torch.complex64), 'int': lambda x: x.int()}
    inputs[name] = casts[value](inputs[name]) if isinstance(value, str) else value
    with pytest.raises(TypeError, match=f'{name} (is|must)'):
        selective_scan(**inputs)


@all_backends
@pytest.mark.parametrize('name', ['u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias'])
def test_nan_input_is_named(backend, name):
    dtype, _ = precision(backend)
    inputs = scan_inputs(2, 6, 5, 2, dtype=dtype, requires_grad=False)
    inputs[name].view(-1)[-1] = float('nan')
    with pytest.raises(ValueError, match=f'1 of .* values of {name} are NaN'):
        selective_scan(**inputs, delta_softplus=True, backend=backend)


def test_unknown_backend():
    inputs = scan_inputs(2, 6, 5, 2, requires_grad=False)
    with pytest.raises(ValueError, match="unknown scan backend 'fast'.*torch"):
        selective_scan(**inputs, backend='fast')


def test_backend_that_cannot_run_says_why(monkeypatch):
    from mmvssm.ops import backends as registry

    gpu = registry.Supplier('gpu', 'for the test', devices=('cuda',))
    monkeypatch.setitem(registry.suppliers, 'gpu', gpu)
    inputs = scan_inputs(2, 6, 5, 2, requires_grad=False)
    with pytest.raises(BackendUnavailableError, match='takes cuda tensors, not cpu'):
        selective_scan(**inputs, backend='gpu')


def _transposed(x):
    """Equal values with the axes in memory in the opposite order."""
    axes = tuple(reversed(range(x.ndim)))
    return x.detach().permute(axes).contiguous().permute(axes).requires_grad_()
