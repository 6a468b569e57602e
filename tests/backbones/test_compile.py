"""One compilation of a backbone serves images of all sizes."""

import pytest
import torch

from compare import relative_error
from families import FAMILIES
from mmvssm.backbones import VSSM
from mmvssm.ops import use_backend

# Heights and widths that are whole patches and that are not; the deepest maps have
# 16 to 144 positions, so some are one chunk of a scan and others several.
SIZES = [
    *[(64, 64), (48, 80), (32, 96), (96, 32), (40, 56)],
    *[(33, 47), (61, 35), (96, 96), (37, 90), (52, 52)],
]


def compiled(net, **options):
    """The compiled model, and a list that gets an entry a compilation."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    return torch.compile(net, fullgraph=True, backend=backend, **options), graphs


def images(size):
    # Of a single image's size, torch asks when it chooses a convolution.
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('name', FAMILIES)
def test_ten_sizes_two_recompilations(name):
    """No graph break (``fullgraph``), and what is computed is what is meant."""
    torch.manual_seed(0)
    net = FAMILIES[name]().eval()
    function, graphs = compiled(net, dynamic=None)
    for size in SIZES:
        x = images(size)
        with torch.no_grad():
            pairs = list(zip(function(x), net(x), strict=True))
        assert max(relative_error(got, want) for got, want in pairs) < 1e-6, size
    assert len(graphs) - 1 <= 2


def gradient(net, function, x):
    torch.manual_seed(0)
    loss = sum(y.square().mean() for y in function(x))
    found = torch.autograd.grad(loss, list(net.parameters()))
    # All of them together: a bias before a batch norm has nothing but noise.
    return torch.cat([x.flatten() for x in found])


def test_training():
    """Forward and backward, dropped branches included.

    The last map has fewer than the 32 positions of a chunk, so no states are saved.
    """
    torch.manual_seed(0)
    net = FAMILIES['vmamba_v05_noz'](drop_path_rate=0.2, out_indices=(0,)).train()
    torch._dynamo.reset()
    function = torch.compile(net, fullgraph=True, backend='aot_eager')
    torch._dynamo.utils.counters.clear()
    for size in [(64, 64), (48, 80), (61, 35), (16, 20)]:
        x = images(size)
        got, want = (gradient(net, f, x) for f in (function, net))
        assert relative_error(got, want) < 1e-5, size
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] - 1 <= 2


def test_order_by_table():
    """It is made for one size, and so is the graph; only ``cross`` has none."""
    torch.manual_seed(0)
    arch = dict(depths=(1, 1), dims=16)
    net = VSSM(arch, out_indices=(0,), orders='hilbert').eval()
    function, _ = compiled(net)
    for size in [(48, 80), (61, 35)]:
        x = images(size)
        with torch.no_grad():
            pairs = list(zip(function(x), net(x), strict=True))
        assert max(relative_error(got, want) for got, want in pairs) < 1e-6, size


@pytest.mark.parametrize('scan', ['cpu', 'torch'])
@pytest.mark.parametrize('name', FAMILIES)
def test_jit_trace(name, scan):
    """A trace by torch.jit serves all sizes and batches, of whole patches or not."""
    torch.manual_seed(0)
    net = FAMILIES[name]().eval()
    with torch.no_grad(), use_backend(scan):
        # The size of the position embedding, and one without padding.
        traced = torch.jit.trace(net, torch.randn(1, 3, 32, 32))
        for batch, height, width in [(3, 33, 47), (1, 200, 260), (2, 4, 5)]:
            x = torch.randn(batch, 3, height, width)
            pairs = list(zip(traced(x), net(x), strict=True))
            assert max(relative_error(got, want) for got, want in pairs) < 1e-6
