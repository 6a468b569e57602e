"""Tests of the Triton backend in Triton's interpreter, without a GPU.

``test_triton_interpreted.py`` runs them in a process of their own: the interpreter
must be asked for by TRITON_INTERPRET=1 before Triton is imported. It takes up to half
a millisecond for each operation of each program, hence the tiny shapes. The published
numbers of long sequences, which take minutes, are compared only with
MMVSSM_LONG_TESTS=1.
"""

import itertools
import os

import pytest
import torch

from mmvssm import ops
from mmvssm.ops import selective_scan, ss2d_scan
from mmvssm.ops.triton import tiles
from parity import Case, list_cases

from .bidirectional_inputs import call, make_inputs
from .scan_inputs import (
    OPTIONAL,
    as_double,
    gradients,
    relative_error,
    scan_inputs,
    ss2d_inputs,
)
from .scan_order_inputs import compare, order_inputs

LONG_TESTS = os.environ.get('MMVSSM_LONG_TESTS', '0') not in ('', '0')
SUBSETS = [s for n in range(4) for s in itertools.combinations(OPTIONAL, n)]


@pytest.fixture
def short_stretches(monkeypatch):
    """Cut sequences from 32 positions on into stretches of a chunk or two."""
    monkeypatch.setattr(tiles, 'SHORTEST_STRETCH', 16)


def scan(inputs, backend='triton', softplus=True):
    return selective_scan(
        **inputs, delta_softplus=softplus, return_last_state=True, backend=backend
    )


def compare_with_reference(inputs, softplus=True):
    """Outputs and gradients, with those of the reference in float64."""
    double = as_double(inputs)
    outs, wants = scan(inputs, softplus=softplus), scan(double, 'reference', softplus)
    pairs = dict(zip(('out', 'last'), zip(outs, wants)))
    got, want = gradients(outs, inputs), gradients(wants, double)
    for name, x in inputs.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape
        pairs[name] = got[name], want[name]
    errors = {name: relative_error(*pair) for name, pair in pairs.items()}
    # Not max(): it may pass over a NaN.
    assert all(error < 2e-6 for error in errors.values()), errors


def test_nothing_else_chooses_the_interpreter():
    assert ops.backend_status()['triton'] is None
    assert ops.choose_backend('cpu', torch.float16) == 'torch'
    assert ops.choose_backend('cpu', torch.float16, 'triton') == 'triton'


@pytest.mark.parametrize(
    'shape',
    [
        (1, 3, 1, 1, 3),
        (2, 5, 19, 1, None),
        (1, 70, 3, 1, 1),
        (1, 4, 17, 8, 2),
        (1, 19, 21, 16, 1),
        (2, 2, 5, 3, 1),
        (1, 5, 4, 200, 1),
        (1, 2, 3, 256, 1),
    ],
)
def test_matches_reference(shape):
    """Tiles, chunks and states that are full, and that are not."""
    compare_with_reference(scan_inputs(*shape, dtype=torch.float32))


@pytest.mark.parametrize('softplus', [False, True])
@pytest.mark.parametrize('optional', SUBSETS, ids='-'.join)
def test_every_option(optional, softplus):
    inputs = scan_inputs(
        *(1, 3, 5, 2), optional=optional, dtype=torch.float32, channels_last=softplus
    )
    for name in inputs.keys() & {'delta', 'delta_bias'}:
        # Steps without softplus are positive, too.
        inputs[name] = (inputs[name].detach().abs() * 0.3).requires_grad_()
    compare_with_reference(inputs, softplus)


@pytest.mark.parametrize('optional', [(), OPTIONAL])
@pytest.mark.parametrize('shape', [(1, 3, 49, 1, 1), (1, 2, 37, 5, 2)])
def test_stretches_side_by_side(short_stretches, shape, optional):
    inputs = scan_inputs(*shape, dtype=torch.float32, optional=optional)
    compare_with_reference(inputs, softplus=True)


def test_growth_from_a_zero_state(short_stretches):
    """A positive A may overflow the growth of a stretch, not a state of zero."""
    inputs = scan_inputs(1, 2, 33, 1, optional=(), dtype=torch.float32)
    inputs = {name: x.detach() for name, x in inputs.items()}
    inputs['A'].fill_(40.0)
    inputs['delta'].fill_(1.0)
    inputs['u'].zero_()
    out, last = scan(inputs, softplus=False)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(last, torch.zeros_like(last))


@pytest.mark.parametrize('decay,step', [(-1e4, 50.0), (-1e-6, 1e-6), (-30.0, 3.0)])
def test_extreme_decays(decay, step):
    inputs = scan_inputs(1, 2, 20, 2, optional=(), dtype=torch.float32)
    inputs['A'] = torch.full_like(inputs['A'], decay).requires_grad_()
    inputs['delta'] = torch.full_like(inputs['delta'], step).requires_grad_()
    out, _ = scan(inputs, softplus=False)
    double = as_double(inputs)
    want, _ = scan(double, 'reference', softplus=False)
    assert relative_error(out, want) < 2e-6
    got, want = gradients((out,), inputs), gradients((want,), double)
    for name in inputs:
        assert torch.isfinite(got[name]).all()
        if want[name].norm() > 1e-30:
            assert relative_error(got[name], want[name]) < 5e-6, name


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_low_precision_keeps_a_float32_state(dtype):
    inputs = scan_inputs(1, 6, 33, 4, 1, dtype=dtype)
    inputs['A'] = inputs['A'].detach().float().requires_grad_()
    out, last = scan(inputs)
    assert out.dtype == dtype and last.dtype == torch.float32
    double = as_double(inputs)
    want, want_last = scan(double, 'reference')
    eps = torch.finfo(dtype).eps
    assert relative_error(last, want_last) < 1e-6
    # Only the final rounding of the output is in the low precision.
    assert relative_error(out, want) < 1e-6 + eps
    got, want = gradients((out,), inputs), gradients((want,), double)
    for name, x in inputs.items():
        assert got[name].dtype == x.dtype
        assert relative_error(got[name], want[name]) < 2e-6 + 2 * eps


def test_autocast_returns_float32():
    inputs = scan_inputs(1, 2, 5, 2, dtype=torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16):
        out, _ = scan(inputs)
    assert out.dtype == torch.float32
    assert gradients((out,), inputs)['u'].dtype == torch.bfloat16


def test_any_strides():
    inputs = scan_inputs(2, 4, 20, 2, dtype=torch.float32, requires_grad=False)
    want, _ = scan(as_double(inputs), 'reference')
    strided = dict(inputs)
    strided['u'] = torch.stack([inputs['u']] * 2, -1)[..., 0]
    strided['delta'] = inputs['delta'].flip(2).contiguous().flip(2)
    strided['z'] = inputs['z'].permute(2, 1, 0).contiguous().permute(2, 1, 0)
    strided['A'] = inputs['A'].T.contiguous().T
    strided['B'] = inputs['B'].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    strided['D'] = torch.stack([inputs['D']] * 3, -1)[:, 1]
    assert relative_error(scan(strided)[0], want) < 2e-6


def test_gradients_have_the_strides_of_the_inputs():
    inputs = scan_inputs(1, 4, 5, 2, 2, dtype=torch.float32)
    inputs = {name: transposed(x) for name, x in inputs.items()}
    out, _ = scan(inputs)
    assert out.stride() == inputs['u'].stride()
    for name, grad in gradients((out,), inputs).items():
        assert grad.stride() == inputs[name].stride(), name


def transposed(x):
    """Equal values with the axes in memory in the opposite order."""
    axes = tuple(reversed(range(x.ndim)))
    return x.detach().permute(axes).contiguous().permute(axes).requires_grad_()


def test_gradient_of_the_last_state_only(short_stretches):
    for length in (5, 35):
        inputs = scan_inputs(1, 2, length, 2, dtype=torch.float32)
        double = as_double(inputs)
        got, want = scan(inputs)[1], scan(double, 'reference')[1]
        names = ('u', 'delta', 'A', 'B')
        got = gradients((got,), {name: inputs[name] for name in names})
        want = gradients((want,), {name: double[name] for name in names})
        for name in names:
            assert relative_error(got[name], want[name]) < 2e-6, name


def test_states_kept_for_the_backward_pass():
    """Of every 16 positions, not of all."""
    inputs = scan_inputs(1, 2, 49, 3, dtype=torch.float32)
    out, _ = scan(inputs)
    *own, kept = out.grad_fn.saved_tensors
    assert kept.shape == (3, 1, 2, 3)
    pointers = {x.data_ptr() for x in inputs.values()}
    assert {x.data_ptr() for x in own} == pointers


def test_compile_fullgraph():
    inputs = scan_inputs(1, 2, 5, 2, dtype=torch.float32)
    compiled = torch.compile(scan, fullgraph=True, backend='aot_eager')
    results = [f(inputs)[0] for f in (scan, compiled)]
    assert torch.equal(*results)
    for a, b in zip(*(gradients((out,), inputs).values() for out in results)):
        assert torch.equal(a, b)


def test_nan_input_is_named():
    inputs = scan_inputs(1, 2, 3, 2, dtype=torch.float32, requires_grad=False)
    inputs['C'].view(-1)[-1] = float('nan')
    with pytest.raises(ValueError, match='1 of .* values of C are NaN'):
        scan(inputs)


@pytest.mark.parametrize('name', list_cases('op_selective_scan_*'))
def test_published_numbers(name):
    case = Case(name)
    inputs = {name: x.requires_grad_() for name, x in case.inputs().items()}
    weights = inputs['B'].shape
    if weights.numel() // weights[-2] > 200 and not LONG_TESTS:
        pytest.skip('takes long; MMVSSM_LONG_TESTS=1 runs it')
    g = inputs.pop('g')
    out, state = scan(inputs, softplus=case.arguments['delta_softplus'])
    (out * g).sum().backward()
    grads = {f'grad_{name}': x.grad for name, x in inputs.items()}
    case.check({'out': out, 'last_state': state, **grads}, 3e-5)


def test_ss2d_scan():
    """With states and a tile that are not full."""
    compare_ss2d(ss2d_inputs(1, 18, 3, 4, 2, 16, dtype=torch.float32))


def compare_ss2d(inputs):
    double = as_double(inputs)
    y = ss2d_scan(**inputs, backend='triton')
    want = ss2d_scan(**double, backend='reference')
    assert relative_error(y, want) < 2e-6
    got, want = gradients((y,), inputs), gradients((want,), double)
    for name in inputs:
        assert relative_error(got[name], want[name]) < 2e-6, name


def test_ss2d_scan_in_stretches(short_stretches):
    """Routes that begin anew in the middle of a row and of a column."""
    compare_ss2d(ss2d_inputs(1, 2, 6, 7, 1, 1, dtype=torch.float32))


def test_scan_orders_in_stretches(short_stretches):
    """A table with padded places, and whole chunks of them, in several stretches."""

    def order(height, width):
        return [[*range(9), *[-1] * 30, *range(9, height * width), -1]]

    inputs = order_inputs(order, (1, 2, 3, 7), dtype=torch.float32)
    compare(inputs, order, 'triton', 2e-6)


@pytest.fixture
def steps_by_a_product(monkeypatch):
    """Make step sizes before the scan, not in it."""
    monkeypatch.setattr(tiles, 'LARGEST_RANK_IN_SCAN', 0)


def test_ss2d_scan_with_steps_by_a_product(steps_by_a_product):
    compare_ss2d(ss2d_inputs(2, 3, 2, 3, 2, 1, dtype=torch.float32))
    compare(
        *(order_inputs('windows2', (1, 3, 3, 2), dtype=torch.float32), 'windows2'),
        *('triton', 2e-6),
    )
    inputs = ss2d_inputs(1, 4, 3, 4, 2, 1, dtype=torch.float16)
    y, want = (ss2d_scan(**inputs, backend=name) for name in ('triton', 'torch'))
    assert y.dtype == torch.float16 and relative_error(y, want) < 4e-3


def compare_bidirectional(inputs):
    double = as_double(inputs)
    y, want = call(inputs, backend='triton'), call(double, backend='reference')
    assert relative_error(y, want) < 2e-6
    got, want = gradients((y,), inputs), gradients((want,), double)
    for name in inputs:
        assert relative_error(got[name], want[name]) < 4e-6, name


def test_bidirectional_scan_with_steps_by_a_product(steps_by_a_product):
    compare_bidirectional(make_inputs(1, 3, 5, 2, 1, 2, dtype=torch.float32))


def test_bidirectional_scan_in_stretches(short_stretches):
    """Several blocks of the convolutions and stretches of the scans."""
    compare_bidirectional(make_inputs(1, 3, 37, 2, 1, 4, dtype=torch.float32))


def test_convolutions_in_parts(monkeypatch):
    """Gradients of their weights out of several sums, of which the last is short."""
    tile = tiles.convolution_tile(3)._replace(rows=4, repeats=2)
    monkeypatch.setattr(tiles, 'convolution_tile', lambda channels: tile)
    compare_bidirectional(make_inputs(2, 3, 21, 1, 1, 3, dtype=torch.float32))
