import pytest
import torch

from mmvssm.ops import selective_scan, ss2d_scan

from .backends_under_test import BACKENDS, on, on_backends, precision, takes
from .scan_inputs import as_double, gradients, relative_error, ss2d_inputs

backends = on_backends(*BACKENDS)


def ss2d_by_definition(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds):
    """Route by route, with projections after the routing as in the paper."""
    height, width = x.shape[2:]
    rank, states = dt_projs_weight.shape[2], A.shape[1]
    order = torch.arange(height * width).reshape(height, width)
    orders = [order.flatten(), order.T.flatten()]
    orders += [o.flip(0) for o in orders]
    merged = 0
    for k, positions in enumerate(orders):
        sequence = x.flatten(2)[:, :, positions]
        projected = x_proj_weight[k] @ sequence
        dt, B, C = projected.split((rank, states, states), dim=1)
        rows = slice(k * x.shape[1], (k + 1) * x.shape[1])
        y = selective_scan(
            sequence,
            dt_projs_weight[k] @ dt,
            A[rows],
            B,
            C,
            Ds[rows],
            delta_bias=dt_projs_bias[k],
            delta_softplus=True,
            backend='reference',
        )
        merged = merged + y[:, :, positions.argsort()]
    return merged.unflatten(2, (height, width))


@backends
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize(
    'size,rank,states', [((4, 5), 2, 1), ((1, 6), 1, 4), ((7, 1), 3, 2), ((1, 1), 1, 1)]
)
def test_matches_the_definition(backend, size, rank, states, channels_last):
    dtype, tolerance = precision(backend)
    inputs = ss2d_inputs(
        *(2, 6, *size, rank, states), dtype=dtype, channels_last=channels_last
    )
    double = as_double(inputs)
    got, want = ss2d_scan(**inputs, backend=backend), ss2d_by_definition(**double)
    assert relative_error(got, want) < tolerance
    got, want = gradients((got,), inputs), gradients((want,), double)
    for name in inputs:
        assert relative_error(got[name], want[name]) < tolerance, name


@pytest.mark.parametrize(
    'backend,dtype',
    [
        on(backend, dtype)
        for backend in BACKENDS
        for dtype in (torch.bfloat16, torch.float16)
        if takes(backend, dtype)
    ],
)
def test_half_precision_in_and_out(backend, dtype):
    inputs = ss2d_inputs(1, 8, 5, 6, 2, 1, dtype=dtype)
    for name in ('A', 'Ds', 'dt_projs_bias'):
        inputs[name] = inputs[name].detach().float()
    y = ss2d_scan(**inputs, backend=backend)
    assert y.dtype == dtype
    want = ss2d_by_definition(**as_double(inputs))
    assert relative_error(y, want) < 4 * torch.finfo(dtype).eps


@backends
def test_half_precision_merges_in_float32(backend):
    """Routes that cancel: each is rounded only after they are added up."""
    inputs = ss2d_inputs(1, 8, 5, 6, 2, 1, dtype=torch.bfloat16)
    inputs = {k: v.detach() for k, v in inputs.items()}
    inputs['x_proj_weight'].zero_()  # leaves D u of each route
    weights = torch.tensor([1001.0, 1.0, -1000.0, 0.0]).repeat_interleave(8)
    inputs.update(
        A=inputs['A'].float(), dt_projs_bias=inputs['dt_projs_bias'].float(), Ds=weights
    )
    y = ss2d_scan(**inputs, backend=backend)
    assert torch.equal(y, 2 * inputs['x'])


@backends
def test_autocast_merges_in_float32(backend):
    inputs = ss2d_inputs(1, 8, 5, 6, 2, 1, dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        y = ss2d_scan(**inputs, backend=backend)
    assert y.dtype == torch.float32
    assert relative_error(y, ss2d_by_definition(**inputs)) < 2e-2
    assert all(torch.isfinite(g).all() for g in gradients((y,), inputs).values())


@backends
def test_compile_fullgraph(backend):
    inputs = ss2d_inputs(1, 4, 3, 4, 1, 2, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(ss2d_scan, fullgraph=True, backend='aot_eager')
    got, want = (f(**inputs, backend=backend) for f in (compiled, ss2d_scan))
    torch.testing.assert_close(got, want)
    got, want = gradients((got,), inputs), gradients((want,), inputs)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    'name', ['x_proj_weight', 'dt_projs_weight', 'dt_projs_bias', 'A', 'Ds']
)
def test_bad_weights_are_named(name):
    inputs = ss2d_inputs(1, 8, 5, 6, 2, 1)
    inputs[name] = inputs[name][:-1]
    with pytest.raises(ValueError, match=f'ss2d_scan: {name} must be'):
        ss2d_scan(**inputs)


@pytest.mark.parametrize('shape', [(8, 5, 6), (1, 8, 0, 6)])
def test_bad_map(shape):
    inputs = ss2d_inputs(1, 8, 5, 6, 2, 1)
    inputs['x'] = torch.zeros(shape)
    with pytest.raises(ValueError, match='ss2d_scan: x must be'):
        ss2d_scan(**inputs)


def test_bad_dtypes():
    inputs = ss2d_inputs(1, 8, 5, 6, 2, 1)
    with pytest.raises(TypeError, match='x must be floating-point'):
        ss2d_scan(**{**inputs, 'x': torch.zeros(1, 8, 5, 6, dtype=torch.int64)})
    with pytest.raises(TypeError, match='x_proj_weight is torch.float64 and x is'):
        ss2d_scan(**{**inputs, 'x': inputs['x'].float()})


def test_shapes_on_the_meta_device():
    inputs = ss2d_inputs(1, 8, 5, 6, 2, 1)
    y = ss2d_scan(**{name: x.to('meta') for name, x in inputs.items()})
    assert y.shape == (1, 8, 5, 6)
