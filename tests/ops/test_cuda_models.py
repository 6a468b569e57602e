"""Models and published numbers on the CUDA kernels, emulated on the CPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compare import relative_error
from mmvssm import ops
from mmvssm.backbones import MLLA, VSSM, MambaR, Vim
from mmvssm.ops import selective_scan
from mmvssm.ops.cuda import kernels
from mmvssm.ops.operator import all_ops
from parity import Case, list_cases

from . import ops_under_test
from .cuda_emulation import AVAILABLE
from .scan_inputs import gradients

pytestmark = pytest.mark.skipif(not AVAILABLE, reason='needs a C++ compiler on Linux')
PLAIN = dict(embed_dims=8, depth=2, patch_size=4, stride=4)
# Of each family, at a tiny size.
MODELS = {
    'vmamba': lambda: VSSM(dict(depths=(1,), dims=8), out_indices=(0,)),
    'vim': lambda: Vim(dict(PLAIN, d_state=16), img_size=16),
    'mambar': lambda: MambaR(dict(PLAIN, d_state=16, registers=3), img_size=16),
    'mlla': lambda: MLLA(dict(depths=(1,), dims=8, num_heads=(2,)), out_indices=(0,)),
}


def outputs_and_gradients(net, function, x):
    """Maps, and the gradients of all weights by all of them."""
    weights = {name: p for name, p in net.named_parameters() if p.requires_grad}
    maps = function(x)
    # Not their squares, whose sum is constant behind a layer norm.
    return maps, gradients(maps, weights)


def assert_same(got, want):
    maps, by_weights = got
    want_maps, want_by_weights = want
    for y, want_y in zip(maps, want_maps, strict=True):
        assert relative_error(y, want_y) < 1e-5
    for name, gradient in want_by_weights.items():
        assert relative_error(by_weights[name], gradient) < 1e-4, name


@pytest.mark.parametrize('name', MODELS)
def test_models(name):
    """Maps and gradients of all weights are those of the backend ``torch``."""
    torch.manual_seed(0)
    net = MODELS[name]().eval()
    x = torch.randn(1, 3, 16, 16)
    with ops.use_backend('torch'):
        want = outputs_and_gradients(net, net, x)
    with ops.use_backend('cuda'):
        assert_same(outputs_and_gradients(net, net, x), want)


@pytest.mark.parametrize('name', MODELS)
def test_compiled_by_inductor(name):
    """It lays out memory by what the ops promise, and refuses anything else."""
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    net = MODELS[name]().eval()
    x = torch.randn(1, 3, 16, 16)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend='inductor')
    with ops.use_backend('cuda'):
        want = outputs_and_gradients(net, net, x)
        assert_same(outputs_and_gradients(net, compiled, x), want)


@pytest.mark.parametrize('name', list_cases('op_selective_scan_*'))
def test_published_numbers(name):
    case = Case(name)
    inputs = {name: x.requires_grad_() for name, x in case.inputs().items()}
    g = inputs.pop('g')
    out, state = selective_scan(
        **inputs,
        delta_softplus=case.arguments['delta_softplus'],
        return_last_state=True,
        backend='cuda',
    )
    (out * g).sum().backward()
    grads = {f'grad_{name}': x.grad for name, x in inputs.items()}
    case.check({'out': out, 'last_state': state, **grads}, 3e-5)


class Allocations(TorchDispatchMode):
    """Bytes of the largest tensor that any operation of torch makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten.flip.default
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return found


def largest_of(case):
    """Of the kernels' side of both passes; the kernels themselves do not run."""
    call = case.asked('cuda')
    backend = all_ops[case.op.name].backends['cuda']
    # So few that one scan keeps them busy.
    with kernels.recording(multiprocessors=4) as launches, Allocations() as seen:
        outputs, saved, _ = backend.forward(call.inputs, call.options, True)
        grads = tuple(torch.empty_like(y) for y in outputs)
        backend.backward(call.inputs, call.options, saved, grads, call.inputs)
    return seen.largest, launches


@pytest.mark.parametrize('rank', [6, 24])
def test_ss2d_never_has_all_scans_in_memory(rank):
    """Where one scan keeps the GPU busy, the largest array is one map in float32."""
    batch, channels = 8, 16 * rank
    case = ops_under_test.ss2d_scan(
        batch, channels, 28, 28, rank, 1, dtype=torch.float32, channels_last=True
    )
    largest, launches = largest_of(case)
    assert launches
    assert largest == batch * channels * 28 * 28 * 4


def test_bidirectional_scan_flips_nothing():
    """The largest array is that of both directions' sequences, or their states."""
    case = ops_under_test.bidirectional_scan(
        8, 384, 197, 12, 16, 4, dtype=torch.float32
    )
    largest, launches = largest_of(case)
    entries = [launch.kernel.entry for launch in launches]
    assert sum('conv' in entry for entry in entries) >= 2
    assert largest <= 2 * 8 * 384 * 197 * 4
