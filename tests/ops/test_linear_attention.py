import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmvssm.layers import rotary_tables
from mmvssm.ops import linear_attention, use_backend
from mmvssm.ops.rotary import rotate

from .backends_under_test import NATIVE_BACKENDS, on, on_backends, precision, takes
from .scan_inputs import as_double, gradients, relative_error

backends = on_backends(*NATIVE_BACKENDS, 'reference')
native = on_backends(*NATIVE_BACKENDS)


def make_inputs(
    batch, length, channels, values=None, *, dtype=torch.float64, scale=1.0, seed=0
):
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(q=channels, k=channels, v=values or channels)
    return {
        name: (
            scale
            * torch.randn(batch, length, size, generator=generator, dtype=torch.float64)
        )
        .to(dtype)
        .requires_grad_()
        for name, size in shapes.items()
    }


def tables(height, width, channels, like):
    return rotary_tables(height, width, channels, like=like).unbind()


def definition(q, k, v, heads=1, rotary=None, normalise=True, eps=1e-6):
    """The formula, one query at a time."""
    length = q.shape[1]
    outs = []
    q, k = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k))
    turned = (q, k) if rotary is None else [rotate(x, *rotary) for x in (q, k)]
    for b in range(q.shape[0]):
        columns = []
        for q_, k_, v_, rq, rk in zip(
            *(x[b].chunk(heads, dim=1) for x in (q, k, v, *turned))
        ):
            rows = []
            for i in range(length):
                y = sum((rq[i] @ rk[j]) * v_[j] for j in range(length)) / length
                z = sum(q_[i] @ k_[j] for j in range(length)) / length
                rows.append(y / (z + eps) if normalise else y)
            columns.append(torch.stack(rows))
        outs.append(torch.cat(columns, dim=1))
    return torch.stack(outs)


@backends
@pytest.mark.parametrize('normalise', [True, False])
@pytest.mark.parametrize('rotated', [True, False])
@pytest.mark.parametrize(
    'height, width, channels, values, heads',
    [(2, 3, 8, 8, 2), (3, 5, 8, 12, 1), (1, 1, 4, 4, 2), (1, 7, 16, 8, 4)],
)
def test_matches_the_definition(
    height, width, channels, values, heads, rotated, normalise, backend
):
    dtype, tolerance = precision(backend)
    inputs = make_inputs(2, height * width, channels, values, dtype=dtype)
    double = as_double(inputs)
    rotary = tables(height, width, channels, double['q']) if rotated else None
    options = dict(heads=heads, rotary=rotary, normalise=normalise)
    got = linear_attention(**inputs, **options, backend=backend)
    want = definition(**double, **options)
    assert relative_error(got, want) < tolerance
    got, want = gradients(got, inputs), gradients(want, double)
    # With a single position hardly anything but v matters.
    noise = tolerance * want['v'].norm()
    for name, x in want.items():
        assert (got[name] - x).norm() < 2 * tolerance * x.norm() + noise, name


@backends
def test_eps(backend):
    dtype, tolerance = precision(backend)
    inputs = make_inputs(1, 5, 4, dtype=dtype)
    # Features near e^-12, with which eps is most of the normaliser.
    with torch.no_grad():
        inputs['q'] -= 12
    for eps in (1e-6, 1e-2):
        got = linear_attention(**inputs, eps=eps, backend=backend)
        want = definition(**as_double(inputs), eps=eps)
        assert relative_error(got, want) < max(tolerance, 1e-9)


@pytest.mark.parametrize('normalise', [True, False])
@pytest.mark.parametrize('rotated', [True, False])
def test_gradcheck(rotated, normalise):
    inputs = make_inputs(2, 6, 8, 4)
    rotary = tables(2, 3, 8, inputs['q']) if rotated else None

    def f(q, k, v):
        return linear_attention(q, k, v, 2, rotary, normalise=normalise)

    assert torch.autograd.gradcheck(f, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(f, tuple(inputs.values()))


@backends
def test_gradient_at_zero(backend):
    # The derivative of the feature map is 1 there, from both sides.
    inputs = make_inputs(1, 3, 4, dtype=precision(backend)[0])
    with torch.no_grad():
        inputs['q'].zero_()
    got = gradients(linear_attention(**inputs, backend=backend), inputs)['q']
    double = as_double(inputs)
    with torch.no_grad():
        double['q'] += 1e-9
    want = gradients(linear_attention(**double), double)['q']
    assert want.abs().max() > 1e-3 and relative_error(got, want) < 1e-6


@native
@pytest.mark.parametrize('normalise', [True, False])
@pytest.mark.parametrize(
    'height, width, scale',
    [(4, 4, 1.0), (4, 4, 6.0), (200, 200, 1.0), (200, 200, 6.0), (50, 800, 1.0)],
)
def test_float32_is_stable_at_any_length(height, width, scale, normalise, backend):
    channels, heads = 64, 2
    inputs = make_inputs(1, height * width, channels, dtype=torch.float32, scale=scale)
    double = as_double(inputs)
    options = dict(heads=heads, normalise=normalise)
    got = linear_attention(
        **inputs,
        rotary=tables(height, width, channels, inputs['q']),
        **options,
        backend=backend,
    )
    want = linear_attention(
        **double, rotary=tables(height, width, channels, double['q']), **options
    )
    assert relative_error(got, want) < 5e-6
    got, want = gradients(got, inputs), gradients(want, double)
    for name in inputs:
        assert relative_error(got[name], want[name]) < 5e-6, name


@native
def test_features_far_below_one_keep_their_accuracy(backend):
    inputs = make_inputs(1, 16, 8, dtype=torch.float32)
    with torch.no_grad():
        inputs['q'] -= 12
        inputs['k'] -= 12
    got = linear_attention(**inputs, eps=0, backend=backend)
    assert relative_error(got, definition(**as_double(inputs), eps=0)) < 1e-5


def test_no_matrix_of_all_pairs():
    length = 3000
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    inputs = make_inputs(1, length, 8, dtype=torch.float32)
    rotary = tables(1, length, 8, inputs['q'])
    with Sizes():
        y = linear_attention(**inputs, heads=2, rotary=rotary, backend='torch')
        y.sum().backward()
    assert max(sizes) <= length * 8
    sizes.clear()
    with Sizes():
        linear_attention(**inputs, backend='reference')
    assert max(sizes) == length**2


@pytest.mark.parametrize(
    'backend, dtype',
    [
        on(backend, dtype)
        for backend in (*NATIVE_BACKENDS, 'reference')
        for dtype in (torch.bfloat16, torch.float16)
        if takes(backend, dtype)
    ],
)
@pytest.mark.parametrize('autocast', [False, True])
def test_half_precision_is_accumulated_in_float32(dtype, autocast, backend):
    inputs = make_inputs(2, 300, 8, dtype=dtype)
    rotary = tables(15, 20, 8, inputs['q'])
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        got = linear_attention(**inputs, heads=2, rotary=rotary, backend=backend)
    assert got.dtype == (torch.float32 if autocast else dtype)
    double = as_double(inputs)
    want = linear_attention(**double, heads=2, rotary=rotary)
    tolerance = 5e-6 if autocast else torch.finfo(dtype).eps
    assert relative_error(got, want) < tolerance
    got, want = gradients(got, inputs), gradients(want, double)
    for name in inputs:
        assert got[name].dtype == dtype
        assert relative_error(got[name], want[name]) < 2 * torch.finfo(dtype).eps, name


@native
def test_mixed_dtypes(backend):
    inputs = make_inputs(1, 6, 8, dtype=torch.bfloat16)
    want = linear_attention(**inputs, backend=backend)
    for dtype in (torch.float16, torch.float32, torch.float64):
        others = dict(inputs, v=inputs['v'].detach().to(dtype).requires_grad_())
        got = linear_attention(**others, backend=backend)
        assert got.dtype == dtype
        torch.testing.assert_close(got.bfloat16(), want)
        for name, x in gradients(got, others).items():
            assert x.dtype == others[name].dtype and x.isfinite().all()


@backends
def test_any_strides(backend):
    inputs = make_inputs(2, 12, 8, dtype=precision(backend)[0])
    rotary = tables(3, 4, 8, inputs['q'])
    want = linear_attention(**inputs, heads=2, rotary=rotary, backend=backend)
    # Channels first, slices of one projection, every other one of a batch.
    q = inputs['q'].detach().mT.contiguous().mT
    qk = torch.cat((inputs['q'], inputs['k']), dim=2).detach()
    k = qk.chunk(2, dim=2)[1]
    v = inputs['v'].detach().repeat_interleave(2, dim=0)[::2]
    got = linear_attention(q, k, v, heads=2, rotary=rotary, backend=backend)
    torch.testing.assert_close(got, want)


def test_backend_of_the_context():
    inputs = make_inputs(1, 5, 4, dtype=torch.float32)
    calls = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                calls.append(tuple(out.shape[-2:]))
            return out

    with Products(), use_backend('reference'):
        linear_attention(**inputs)
    assert (5, 5) in calls
    calls.clear()
    with Products():
        linear_attention(**inputs)
    assert (5, 5) not in calls


@backends
def test_compile_fullgraph(backend):
    inputs = make_inputs(2, 6, 8, dtype=torch.float32)
    rotary = tables(2, 3, 8, inputs['q'])

    def f(q, k, v):
        return linear_attention(q, k, v, 2, rotary, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend='aot_eager')
    got, want = compiled(**inputs), f(**inputs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(got, inputs), gradients(want, inputs))


def test_bad_arguments():
    q, k, v = (x.detach() for x in make_inputs(2, 6, 8).values())
    rotary = tables(2, 3, 8, q)
    with pytest.raises(TypeError, match='must be floating-point, got torch.int64'):
        linear_attention(q.long(), k, v)
    with pytest.raises(ValueError, match=r'one shape .* got \(2, 6, 8\) and \(2, 5,'):
        linear_attention(q, k[:, :5], v)
    with pytest.raises(ValueError, match='no empty side'):
        linear_attention(q[:, :0], k[:, :0], v[:, :0])
    with pytest.raises(ValueError, match=r'v must be .* got \(2, 5, 8\)'):
        linear_attention(q, k, v[:, :5])
    with pytest.raises(ValueError, match=r'channels of q and v, 8 and 6, got 4'):
        linear_attention(q, k, v[..., :6], 4)
    with pytest.raises(ValueError, match=r'\(6, 4\), .* got \[\(5, 4\), \(6, 4\)\]'):
        linear_attention(q, k, v, 2, (rotary[0][:5], rotary[1]))
    with pytest.raises(ValueError, match='whole pairs of channels in each of the 8'):
        linear_attention(q, k, v, 8, rotary)
