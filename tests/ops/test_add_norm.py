import pytest
import torch
import torch.nn.functional as F

from mmvssm.ops import add_rms_norm

from .backends_under_test import (
    BACKENDS,
    FAST_BACKENDS,
    on,
    on_backends,
    precision,
    takes,
)
from .scan_inputs import as_double, gradients, relative_error

backends = on_backends(*BACKENDS)
fast_backends = on_backends(*FAST_BACKENDS)


def make_inputs(*shape, residual=True, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = dict(x=normal(*shape), weight=1 + normal(shape[-1]) / 10)
    if residual:
        inputs['residual'] = normal(*shape)
    return {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}


def definition(x, weight, residual=None, eps=1e-5):
    total = x if residual is None else x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


@backends
@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('shape', [(2, 5, 24), (1, 1, 7), (3, 1), (9,)])
def test_matches_the_definition(backend, shape, residual):
    dtype, tolerance = precision(backend)
    # Small enough for eps to matter.
    inputs = make_inputs(*shape, residual=residual, dtype=dtype, scale=0.01)
    double = as_double(inputs)
    got, want = add_rms_norm(**inputs, backend=backend), definition(**double)
    for ours, theirs in zip(got, want):
        assert relative_error(ours, theirs) < tolerance
    got, want = gradients(got, inputs), gradients(want, double)
    for name in inputs:
        assert relative_error(got[name], want[name]) < 4 * tolerance, name


@backends
def test_eps(backend):
    inputs = make_inputs(2, 8, residual=False, dtype=torch.float32, scale=1e-3)
    for eps in (1e-6, 1e-2):
        got, _ = add_rms_norm(**inputs, eps=eps, backend=backend)
        torch.testing.assert_close(got, definition(**inputs, eps=eps)[0])


@pytest.mark.parametrize(
    'backend,dtype',
    [
        on(backend, dtype)
        for backend in BACKENDS
        for dtype in (torch.bfloat16, torch.float16)
        if takes(backend, dtype)
    ],
)
@pytest.mark.parametrize('autocast', [False, True])
def test_dtype_of_the_stream(backend, dtype, autocast):
    inputs = make_inputs(2, 5, 16, dtype=dtype)
    x, weight, residual = (t.detach() for t in inputs.values())
    full = residual.float()
    context = torch.autocast('cpu', torch.bfloat16, enabled=autocast)
    cases = [
        (None, False, dtype),
        (None, True, torch.float32),
        (residual, False, dtype),
        (residual, True, torch.float32),
        (full, False, torch.float32),
    ]
    for stream, in_fp32, want_dtype in cases:
        with context:
            out, got = add_rms_norm(
                x, weight, stream, residual_in_fp32=in_fp32, backend=backend
            )
        assert out.dtype == dtype and got.dtype == want_dtype
        total = x.float() if stream is None else x.float() + stream.float()
        assert torch.equal(got, total.to(want_dtype))
        want, _ = definition(total, weight.float())
        assert torch.equal(out, want.to(dtype)) or relative_error(out, want) < (
            torch.finfo(dtype).eps
        )


@backends
@pytest.mark.parametrize('which', ['out', 'total'])
def test_gradient_of_one_result(backend, which):
    dtype, tolerance = precision(backend)
    inputs = make_inputs(2, 40, 33, dtype=dtype)
    double = as_double(inputs)
    index = ('out', 'total').index(which)
    got = add_rms_norm(**inputs, backend=backend)[index]
    want = definition(**double)[index]
    names = [name for name in inputs if which == 'out' or name != 'weight']
    got = gradients((got,), {name: inputs[name] for name in names})
    want = gradients((want,), {name: double[name] for name in names})
    for name in names:
        assert relative_error(got[name], want[name]) < 4 * tolerance, name


@backends
@pytest.mark.parametrize('in_fp32', [False, True])
def test_gradients_in_half_precision(backend, in_fp32):
    inputs = make_inputs(3, 70, 24, dtype=torch.bfloat16)
    double = as_double(inputs)
    outs = add_rms_norm(**inputs, residual_in_fp32=in_fp32, backend=backend)
    got, want = gradients(outs, inputs), gradients(definition(**double), double)
    for name in inputs:
        assert got[name].dtype == torch.bfloat16
        assert relative_error(got[name], want[name]) < 1e-2, name


@backends
def test_second_gradients_with_a_stream_of_another_dtype(backend):
    """Both terms of the sum get a gradient, and only the sum is kept."""
    x, weight, residual = make_inputs(2, 5, 8).values()
    inputs = [x.detach().bfloat16(), weight.detach().float(), residual.detach().float()]

    def second(tensors, backend):
        tensors = [t.requires_grad_() for t in tensors]
        y, stream = add_rms_norm(*tensors, residual_in_fp32=True, backend=backend)
        total = y.square().sum() + stream.square().sum()
        first = torch.autograd.grad(total, tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    want = second([t.double() for t in inputs], 'reference')
    for x, y in zip(second(inputs, backend), want):
        assert relative_error(x, y) < 2e-2


@backends
def test_any_strides(backend):
    inputs = make_inputs(2, 12, 9, dtype=torch.float32)
    want = add_rms_norm(**inputs, backend=backend)
    for name in ('x', 'residual'):
        inputs[name] = inputs[name].detach().mT.contiguous().mT.requires_grad_()
    got = add_rms_norm(**inputs, backend=backend)
    torch.testing.assert_close(got, want)
    assert all(g.isfinite().all() for g in gradients(got, inputs).values())


@backends
def test_compile_fullgraph(backend):
    inputs = make_inputs(2, 5, 8, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(add_rms_norm, fullgraph=True, backend='aot_eager')
    got, want = (f(**inputs, backend=backend) for f in (compiled, add_rms_norm))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(got, inputs), gradients(want, inputs))


def test_bad_arguments():
    inputs = make_inputs(2, 5, 8)
    with pytest.raises(TypeError, match='x must be floating-point, got torch.int64'):
        add_rms_norm(torch.zeros(2, 8, dtype=torch.int64), inputs['weight'])
    with pytest.raises(ValueError, match=r'weight must be .* \(7,\) and \(2, 5, 8\)'):
        add_rms_norm(inputs['x'], torch.ones(7))
    with pytest.raises(ValueError, match=r'residual must have .* got \(2, 4, 8\)'):
        add_rms_norm(inputs['x'], inputs['weight'], inputs['residual'][:, :4])
