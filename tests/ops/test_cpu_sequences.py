"""The compiled kernels of bidirectional_scan and add_rms_norm.

The truth is the definition in float64.
"""

import pytest
import torch
from torch import nn

from mmvssm.ops import add_rms_norm
from mmvssm.ops.cpu import library

from .backends_under_test import on_every_isa, precision
from .bidirectional_inputs import WAYS, call, flip_twice, make_inputs
from .scan_inputs import as_double, gradients, relative_error

_, TOLERANCE = precision('cpu')
every_isa = on_every_isa()
NAN = float('nan')


@pytest.fixture(autouse=True)
def use_isa(request):
    """Each test here runs on the instruction set of its parameter."""
    with library.use_isa(request.getfixturevalue('isa')):
        yield


def check(inputs, average=False, tolerance=TOLERANCE, skip=()):
    double = as_double(inputs)
    want, got = (
        flip_twice(double, average),
        call(inputs, average=average, backend='cpu'),
    )
    results = dict(y=got, **gradients((got,), inputs))
    truth = dict(y=want, **gradients((want,), double))
    errors = {name: relative_error(results[name], truth[name]) for name in truth}
    wrong = {name: e for name, e in errors.items() if not e < tolerance}
    assert not wrong, wrong
    for name, x in inputs.items():
        assert results[name].dtype == x.dtype and results[name].shape == x.shape


@every_isa
@pytest.mark.parametrize('average', [False, True])
@pytest.mark.parametrize(
    'batch,channels,length,rank,states,taps',
    [
        (2, 34, 70, 3, 5, 4),
        (1, 1, 1, 1, 1, 1),
        (3, 15, 2, 1, 1, 4),
        (1, 17, 31, 2, 16, 2),
        (2, 64, 32, 2, 3, 3),
        (1, 130, 33, 5, 2, 5),
        (2, 16, 64, 1, 8, 9),
        (1, 20, 40, 2, 2, 40),
    ],
)
def test_shapes(isa, batch, channels, length, rank, states, taps, average):
    inputs = make_inputs(
        *(batch, channels, length, rank, states, taps), dtype=torch.float32
    )
    check(inputs, average)


@every_isa
@pytest.mark.parametrize('length', [197, 1025])
def test_as_a_network_starts(isa, length):
    """Slow and fast decays in one channel, over many chunks."""
    inputs = make_inputs(1, 32, length, 2, 16, 4, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    dt = 1e-3 * 100 ** torch.rand(32, generator=generator)
    for way in WAYS:
        bias = dt + torch.log(-torch.expm1(-dt))
        A = -torch.arange(1.0, 17).repeat(32, 1)
        for name, x in (('dt_proj_bias', bias), ('A', A), ('D', torch.ones(32))):
            inputs[f'{way}.{name}'] = x.clone().requires_grad_()
    check(inputs)


def _inside(x, margin):
    """The same values inside a bigger tensor of NaN: reading those by mistake shows."""
    shape = [n + 2 * margin for n in x.shape]
    inner = torch.full(shape, NAN)[tuple(slice(margin, margin + n) for n in x.shape)]
    return inner.copy_(x)


LAYOUTS = {
    'positions last': lambda x: x.contiguous(),
    'batch last': lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    'columns of a matrix': lambda x: _inside(x.mT, 3).mT,
    'rows of a matrix': lambda x: _inside(x, 3),
}


@every_isa
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('shape', [(2, 40, 70, 3, 2, 4), (3, 64, 45, 1, 1, 3)])
def test_strides(isa, layout, shape):
    inputs = make_inputs(*shape, dtype=torch.float32)
    for name in ('x', 'z'):
        inputs[name] = LAYOUTS[layout](inputs[name].detach()).requires_grad_()
    check(inputs)


@every_isa
def test_convolution_of_any_size_of_numbers(isa):
    """SiLU of large and small numbers of both signs, and its gradient."""
    inputs = make_inputs(1, 20, 37, 2, 2, 4, dtype=torch.float32)
    for way in WAYS:
        scale = torch.logspace(-3, 2, 20)[:, None]
        weight = inputs[f'{way}.conv_weight'].detach() * scale
        inputs[f'{way}.conv_weight'] = weight.requires_grad_()
        inputs[f'{way}.x_proj_weight'] = torch.zeros(6, 20, requires_grad=True)
    double = as_double(inputs)
    names = ('x', *(f'{way}.conv_weight' for way in WAYS))
    got, want = call(inputs, backend='cpu'), flip_twice(double)
    assert relative_error(got, want) < TOLERANCE
    got = gradients((got,), {name: inputs[name] for name in names})
    want = gradients((want,), {name: double[name] for name in names})
    for name in names:
        assert relative_error(got[name], want[name]) < TOLERANCE, name


@every_isa
def test_bfloat16_stays_near(isa):
    inputs = make_inputs(2, 40, 45, 3, 4, 4, dtype=torch.bfloat16)
    check(inputs, tolerance=0.05)


@every_isa
@pytest.mark.parametrize('name', ['x', 'z', 'forward.D', 'backward.dt_proj_bias'])
def test_nan_is_found(isa, name):
    for shape in ((1, 17, 33, 1, 5, 4), (1, 64, 32, 2, 1, 4)):
        inputs = make_inputs(*shape, dtype=torch.float32)
        inputs = {key: x.detach() for key, x in inputs.items()}
        inputs[name][(-1,) * inputs[name].ndim] = NAN
        with pytest.raises(ValueError, match=f'1 of .* values of {name} are NaN'):
            call(inputs, backend='cpu')


# Residual addition and norm


def norm_inputs(rows, channels, dtype=torch.float32, residual=None, spread=0.0):
    generator = torch.Generator().manual_seed(0)
    x, stream = torch.randn(2, rows, channels, generator=generator)
    scale = 10 ** (spread * torch.randn(rows, 1, generator=generator))
    inputs = dict(
        x=(scale * x).to(dtype), weight=1 + torch.randn(channels, generator=generator)
    )
    if residual is not None:
        inputs['residual'] = (scale * stream).to(residual)
    return {name: t.requires_grad_() for name, t in inputs.items()}


def norm(x, weight, residual=None):
    total = x if residual is None else x + residual
    return nn.functional.rms_norm(total, weight.shape, weight, 1e-5), total


def check_norm(inputs, tolerance=TOLERANCE, **options):
    double = as_double(inputs)
    got, want = add_rms_norm(**inputs, backend='cpu', **options), norm(**double)
    results = dict(zip(('y', 'total'), got), **gradients(got, inputs))
    truth = dict(zip(('y', 'total'), want), **gradients(want, double))
    for name in truth:
        assert relative_error(results[name], truth[name]) < tolerance, name


@every_isa
@pytest.mark.parametrize('residual', [None, torch.float32])
@pytest.mark.parametrize('channels', [1, 3, 15, 16, 17, 33, 384])
@pytest.mark.parametrize('rows', [1, 31, 33, 97])
def test_norm_shapes(isa, rows, channels, residual):
    check_norm(norm_inputs(rows, channels, residual=residual))


@every_isa
def test_norm_of_rows_of_any_size(isa):
    """Row by row, so that the gradient of the largest does not hide the others'."""
    inputs = norm_inputs(50, 40, residual=torch.float32, spread=3.0)
    double = as_double(inputs)
    got, want = add_rms_norm(**inputs, backend='cpu')[0], norm(**double)[0]
    got = gradients((got,), inputs)['x']
    want = gradients((want,), double)['x']
    for row in range(50):
        assert relative_error(got[row], want[row]) < 2 * TOLERANCE


HALF, FULL = torch.bfloat16, torch.float32


@every_isa
@pytest.mark.parametrize(
    'dtype,residual',
    [(HALF, None), (HALF, HALF), (HALF, FULL), (FULL, HALF)],
)
@pytest.mark.parametrize('in_fp32', [False, True])
def test_norm_dtypes(isa, dtype, residual, in_fp32):
    inputs = norm_inputs(35, 50, dtype=dtype, residual=residual)
    check_norm(inputs, tolerance=1e-2, residual_in_fp32=in_fp32)
