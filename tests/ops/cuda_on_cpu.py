"""Tests of the CUDA kernels on the CPU, see ``cuda_emulation/cuda_on_host.h``.

``test_cuda.py`` runs them in a process of their own, together with the tests of
the ops for all backends. Here is what is special to these kernels: blocks that
are full and that are not, every kernel for a number of states or a rank,
stretches, barriers, and whole models.
"""

import pytest
import torch

from mmvssm import ops
from mmvssm.backbones import VSSM, MambaR, Vim
from mmvssm.ops import selective_scan, ss2d_scan
from mmvssm.ops.cuda import library
from mmvssm.ops.selective_scan import cuda_backend
from parity import Case, list_cases

from .scan_inputs import (
    OPTIONAL,
    as_double,
    gradients,
    relative_error,
    scan_inputs,
    ss2d_inputs,
)
from .scan_order_inputs import compare, order_inputs


@pytest.fixture(params=[False, True], ids=['whole', 'stretches'])
def stretches(request, monkeypatch):
    """Leave sequences whole, or cut them into stretches of a chunk or two."""
    if request.param:
        monkeypatch.setattr(cuda_backend, '_SHORTEST_STRETCH', 16)


def scan(inputs, backend='cuda', softplus=True):
    return selective_scan(
        **inputs, delta_softplus=softplus, return_last_state=True, backend=backend
    )


def compare_with_reference(inputs):
    """Outputs and gradients, with those of the reference in float64."""
    double = as_double(inputs)
    outs, wants = scan(inputs), scan(double, 'reference')
    pairs = dict(zip(('out', 'last'), zip(outs, wants)))
    got, want = gradients(outs, inputs), gradients(wants, double)
    for name, x in inputs.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape
        pairs[name] = got[name], want[name]
    errors = {name: relative_error(*pair) for name, pair in pairs.items()}
    # Not max(): it may pass over a NaN.
    assert all(error < 2e-6 for error in errors.values()), errors


@pytest.mark.parametrize('optional', [(), OPTIONAL], ids=['plain', 'all'])
@pytest.mark.parametrize(
    'shape',
    [
        (2, 5, 49, 1, None),
        (1, 140, 35, 1, 1),
        (1, 300, 33, 1, 3),
        (1, 12, 40, 5, 2),
        (1, 70, 37, 8, 1),
        (2, 40, 50, 16, 1),
        (1, 33, 17, 13, 3),
        (1, 9, 37, 40, 3),
        (1, 18, 19, 64, 1),
        (1, 5, 35, 200, 1),
        (1, 2, 40, 256, 1),
    ],
)
def test_matches_reference(stretches, shape, optional):
    compare_with_reference(scan_inputs(*shape, dtype=torch.float32, optional=optional))


@pytest.mark.parametrize('states', [1, 8, 16, 40, 200])
def test_threads_in_the_opposite_order(monkeypatch, stretches, states):
    """The same bits: every barrier that the threads of a block need is there."""
    inputs = scan_inputs(1, 70, 40, states, 2, dtype=torch.float32)
    results = []
    for order in ('forward', 'reverse'):
        monkeypatch.setenv('MMVSSM_HOST_ORDER', order)
        outs = scan(inputs)
        results.append([*outs, *gradients(outs, inputs).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_growth_from_a_zero_state(stretches):
    """A positive A may overflow the growth of a stretch, not a state of zero."""
    inputs = scan_inputs(1, 2, 33, 1, optional=(), dtype=torch.float32)
    inputs = {name: x.detach() for name, x in inputs.items()}
    inputs['A'].fill_(40.0)
    inputs['delta'].fill_(1.0)
    inputs['u'].zero_()
    out, last = scan(inputs, softplus=False)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(last, torch.zeros_like(last))


def test_gradient_of_the_last_state_only(stretches):
    inputs = scan_inputs(1, 3, 35, 2, dtype=torch.float32)
    double = as_double(inputs)
    got, want = scan(inputs)[1], scan(double, 'reference')[1]
    names = ('u', 'delta', 'A', 'B')
    got = gradients((got,), {name: inputs[name] for name in names})
    want = gradients((want,), {name: double[name] for name in names})
    for name in names:
        assert relative_error(got[name], want[name]) < 2e-6, name


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_dtypes_may_differ(dtype):
    """Activations of one dtype, step sizes, weights or gate of another."""
    wide = scan_inputs(1, 6, 33, 4, 1, dtype=torch.float32, requires_grad=False)
    want, _ = scan({name: x.to(dtype) for name, x in wide.items()}, 'reference')
    for kept in (('u', 'z'), ('delta',), ('B', 'C'), ('z',)):
        # Values that both dtypes have.
        inputs = {
            name: x.to(dtype) if name in kept else x.to(dtype).float()
            for name, x in wide.items()
        }
        out, _ = scan(inputs)
        assert out.dtype == inputs['u'].dtype
        assert relative_error(out, want) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_numbers_of_half_precision(dtype):
    """All of them, subnormal ones too, and what is too large or falls between."""
    u = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    u = u[u.isfinite()].reshape(1, -1, 1)
    channels = u.shape[1]
    zero, A = torch.zeros(1, 1, 1), -torch.ones(channels, 1)
    for factor in (1.0, 1.0003, 0.9):
        D = torch.full((channels,), factor)
        arguments = (u, torch.zeros_like(u), A, zero, zero, D)
        outs = [selective_scan(*arguments, backend=b) for b in ('cuda', 'reference')]
        assert torch.equal(*outs)


def test_states_kept_for_the_backward_pass():
    """Of every 16 positions, not of all."""
    inputs = scan_inputs(1, 2, 49, 3, dtype=torch.float32)
    out, _ = scan(inputs)
    *own, kept = out.grad_fn.saved_tensors
    assert kept.shape == (3, 1, 2, 3)
    pointers = {x.data_ptr() for x in inputs.values()}
    assert {x.data_ptr() for x in own} == pointers


def test_too_many_states():
    inputs = scan_inputs(1, 2, 3, 257, dtype=torch.float32, requires_grad=False)
    with pytest.raises(ops.BackendUnavailableError, match='256 states, not 257'):
        scan(inputs)


def transposed(x):
    """Equal values with the axes in memory in the opposite order."""
    axes = tuple(reversed(range(x.ndim)))
    return x.detach().permute(axes).contiguous().permute(axes).requires_grad_()


@pytest.mark.parametrize('name', list_cases('op_selective_scan_*'))
def test_published_numbers(name):
    case = Case(name)
    inputs = {name: x.requires_grad_() for name, x in case.inputs().items()}
    g = inputs.pop('g')
    out, state = scan(inputs, softplus=case.arguments['delta_softplus'])
    (out * g).sum().backward()
    grads = {f'grad_{name}': x.grad for name, x in inputs.items()}
    case.check({'out': out, 'last_state': state, **grads}, 3e-5)


RANKS = (1, 8, 9, 16, 17, library.MAX_RANK, library.MAX_RANK + 1)


@pytest.mark.parametrize('states', [1, 3, 16, 17])
@pytest.mark.parametrize('rank', RANKS)
def test_ss2d_scan(stretches, rank, states):
    """Every kernel that projects steps, and what is beyond them."""
    compare_ss2d(ss2d_inputs(1, 5, 6, 7, rank, states, dtype=torch.float32))


@pytest.mark.parametrize('shape', [(2, 130, 3, 5), (1, 3, 1, 40), (1, 3, 40, 1)])
def test_ss2d_scan_of_any_shape(stretches, shape):
    compare_ss2d(ss2d_inputs(*shape, 2, 1, dtype=torch.float32))


@pytest.mark.parametrize('rank', [2, library.MAX_RANK + 1])
@pytest.mark.parametrize('states', [1, 3, 16, 40])
def test_scan_orders(stretches, states, rank):
    """Tables with padded places, and whole chunks of them."""

    def order(height, width):
        return [[*range(9), *[-1] * 40, *range(9, height * width), -1]]

    for orders in (order, 'windows7'):
        inputs = order_inputs(
            *(orders, (2, 5, 6, 8), rank, states), dtype=torch.float32
        )
        compare(inputs, orders, 'cuda', 2e-6)


def compare_ss2d(inputs):
    double = as_double(inputs)
    y = ss2d_scan(**inputs, backend='cuda')
    want = ss2d_scan(**double, backend='reference')
    assert relative_error(y, want) < 2e-6
    got, want = gradients((y,), inputs), gradients((want,), double)
    for name in inputs:
        assert relative_error(got[name], want[name]) < 2e-6, name


PLAIN = dict(embed_dims=8, depth=2, patch_size=4, stride=4)
# VMamba, Vim and Mamba® at a tiny size.
MODELS = {
    'vmamba': lambda: VSSM(dict(depths=(1, 1), dims=8), out_indices=(0, 1)),
    'vim': lambda: Vim(dict(PLAIN, d_state=16), 16),
    'mambar': lambda: MambaR(dict(PLAIN, d_state=16, registers=3), 16),
}


@pytest.mark.parametrize('name', MODELS)
def test_models(name):
    """Maps and gradients of all weights, with those of the backend torch."""
    torch.manual_seed(0)
    net = MODELS[name]().eval()
    x = torch.randn(1, 3, 16, 16)
    weights = {name: p for name, p in net.named_parameters() if p.requires_grad}
    found = []
    for backend in ('cuda', 'torch'):
        with ops.use_backend(backend):
            maps = net(x)
        # Not their squares, whose sum is constant behind a layer norm.
        found.append((maps, gradients(maps, weights)))
    (maps, got), (want_maps, want) = found
    for y, want_y in zip(maps, want_maps, strict=True):
        assert relative_error(y, want_y) < 1e-5
    for name, gradient in want.items():
        assert relative_error(got[name], gradient) < 1e-4, name
