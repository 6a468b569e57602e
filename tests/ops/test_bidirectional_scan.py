import pytest
import torch
import torch.nn.functional as F

from mmvssm.ops import Direction
from mmvssm.ops.bidirectional_scan.declaration import BIDIRECTIONAL_SCAN

from .backends_under_test import (
    BACKENDS,
    FAST_BACKENDS,
    on,
    on_backends,
    precision,
    takes,
)
from .bidirectional_inputs import (
    WAYS,
    call,
    direction,
    flip_twice,
    make_inputs,
)
from .scan_inputs import as_double, gradients, relative_error

backends = on_backends(*BACKENDS)
fast_backends = on_backends(*FAST_BACKENDS)
SHAPES = [
    (2, 6, 19, 3, 4, 4),
    (1, 5, 1, 1, 1, 4),
    (1, 4, 2, 2, 3, 3),
    (2, 1, 7, 1, 2, 1),
]


@backends
@pytest.mark.parametrize('average', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
def test_matches_flipping_twice(backend, shape, average):
    dtype, tolerance = precision(backend)
    inputs = make_inputs(*shape, dtype=dtype)
    double = as_double(inputs)
    got = call(inputs, average=average, backend=backend)
    want = flip_twice(double, average)
    assert got.dtype == dtype and got.shape == want.shape
    assert relative_error(got, want) < tolerance
    got, want = gradients((got,), inputs), gradients((want,), double)
    for name in inputs:
        assert relative_error(got[name], want[name]) < 4 * tolerance, name


@backends
def test_directions_do_not_mix(backend):
    """A change at a position reaches what follows it in each direction, only."""
    inputs = make_inputs(1, 4, 9, 2, 3, 4, dtype=torch.float32)
    inputs = {name: t.detach() for name, t in inputs.items()}
    for way, unchanged in (('backward', slice(0, 5)), ('forward', slice(6, 9))):
        silent = inputs | {f'{way}.D': torch.zeros(4)}
        silent[f'{way}.x_proj_weight'] = torch.zeros(8, 4)
        before = call(silent, backend=backend)
        changed = silent | {'x': silent['x'].clone()}
        changed['x'][..., 5] += 1
        after = call(changed, backend=backend)
        assert torch.equal(before[..., unchanged], after[..., unchanged])
        assert not torch.allclose(before[..., 5], after[..., 5])


@backends
def test_any_strides(backend):
    inputs = make_inputs(2, 6, 11, 3, 4, 4, dtype=torch.float32)
    want = call(inputs, backend=backend)
    for name in ('x', 'z'):
        inputs[name] = inputs[name].detach().contiguous()
    torch.testing.assert_close(call(inputs, backend=backend), want)


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
    inputs = make_inputs(1, 16, 23, 3, 4, 4, dtype=dtype)
    for name in inputs:
        if name.rpartition('.')[2] in ('dt_proj_bias', 'A', 'D'):
            inputs[name] = inputs[name].detach().float()
    y = call(inputs, backend=backend)
    assert y.dtype == dtype
    assert relative_error(y, flip_twice(as_double(inputs))) < 4 * torch.finfo(dtype).eps


@backends
def test_sum_of_directions_in_float32(backend):
    """Directions that cancel: each is rounded only after they are added up."""
    dtype = torch.bfloat16
    inputs = make_inputs(1, 8, 13, 2, 2, 1, dtype=dtype)
    inputs = {name: t.detach() for name, t in inputs.items()}
    for way, skip in (('forward', 1001.0), ('backward', -1000.0)):
        inputs[f'{way}.conv_weight'] = torch.ones(8, 1, dtype=dtype)
        inputs[f'{way}.conv_bias'] = torch.zeros(8, dtype=dtype)
        inputs[f'{way}.x_proj_weight'].zero_()  # leaves D u
        inputs[f'{way}.D'] = torch.full((8,), skip)
    u, gate = (F.silu(inputs[name].float()) for name in ('x', 'z'))
    want = u.to(dtype).float() if backend != 'reference' else u
    torch.testing.assert_close(
        call(inputs, backend=backend).float(), want * gate, rtol=8e-3, atol=1e-3
    )


@backends
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    inputs = make_inputs(1, 16, 23, 3, 4, 4, dtype=torch.float32)
    with torch.autocast('cpu', dtype):
        y = call(inputs, backend=backend)
    assert y.dtype == torch.float32
    assert relative_error(y, flip_twice(as_double(inputs))) < 2e-2
    assert all(torch.isfinite(g).all() for g in gradients((y,), inputs).values())


@backends
def test_compile_fullgraph(backend):
    inputs = make_inputs(1, 4, 5, 1, 2, 4, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend='aot_eager')
    got, want = (f(inputs, backend=backend) for f in (compiled, call))
    torch.testing.assert_close(got, want)
    got, want = gradients((got,), inputs), gradients((want,), inputs)
    torch.testing.assert_close(got, want)


# The others name what reaches the scan.
fused_backends = on_backends(
    *(name for name in BACKENDS if name in BIDIRECTIONAL_SCAN.backends)
)


@backends
def test_directions_of_other_widths_and_ranks(backend):
    dtype, tolerance = precision(backend)
    inputs = make_inputs(1, 5, 11, 3, 2, 4, dtype=dtype)
    other = direction(torch.Generator().manual_seed(1), 5, 1, 2, 2)
    inputs |= {
        f'backward.{name}': t.to(dtype).requires_grad_()
        for name, t in other._asdict().items()
    }
    double = as_double(inputs)
    got, want = call(inputs, backend=backend), flip_twice(double)
    assert relative_error(got, want) < tolerance
    got, want = gradients((got,), inputs), gradients((want,), double)
    for name in inputs:
        assert relative_error(got[name], want[name]) < 4 * tolerance, name


@fused_backends
@pytest.mark.parametrize('name', ['x', 'z', 'forward.conv_bias', 'backward.A'])
def test_nan_is_named(backend, name):
    inputs = make_inputs(1, 20, 37, 3, 2, 4, dtype=torch.float32)
    inputs = {key: t.detach() for key, t in inputs.items()}
    inputs[name][(-1,) * inputs[name].ndim] = float('nan')
    with pytest.raises(ValueError, match=rf'1 of .* values of {name} are NaN'):
        call(inputs, backend=backend)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', Direction._fields)
def test_bad_weights_are_named(way, name):
    inputs = make_inputs(1, 8, 5, 2, 3, 4)
    inputs[f'{way}.{name}'] = inputs[f'{way}.{name}'][:-1]
    # The width of the convolution and the rest follow from its first rows.
    with pytest.raises(ValueError, match=rf'bidirectional_scan: {way}\.{name} must be'):
        call(inputs)


def test_other_bad_arguments():
    inputs = make_inputs(1, 8, 5, 2, 3, 4)
    for key, value, message in (
        ('x', torch.zeros(8, 5), 'x must be'),
        ('x', torch.zeros(1, 8, 0), 'x must be'),
        ('z', torch.zeros(1, 8, 4), 'z must have'),
        ('forward.A', torch.zeros(8), 'forward.A must have two dimensions'),
    ):
        with pytest.raises(ValueError, match=f'bidirectional_scan: {message}'):
            call(inputs | {key: value})
    with pytest.raises(TypeError, match='x must be floating-point'):
        call(inputs | {'x': torch.zeros(1, 8, 5, dtype=torch.int64)})
    with pytest.raises(TypeError, match='forward.x_proj_weight is torch.float64 and'):
        call(inputs | {name: inputs[name].float() for name in ('x', 'z')})
    fewer = {
        f'forward.{k}': v
        for k, v in direction(torch.Generator(), 8, 2, 2, 4)._asdict().items()
    }
    with pytest.raises(ValueError, match='same number of states, got 2 and 3'):
        call(inputs | fewer)


def test_shapes_on_the_meta_device():
    inputs = make_inputs(2, 8, 5, 2, 3, 4)
    y = call({name: x.to('meta') for name, x in inputs.items()})
    assert y.shape == (2, 8, 5)
