from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mmvssm
from families import FAMILIES
from mmvssm.analysis.flops import (
    DISPATCH_HANDLES,
    SCAN_HANDLES,
    count_flops,
    scan_flops,
)

CONFIGS = {
    # parameters (M) and FLOPs (G) at 512x2048 as published
    'upernet_vmamba_t.py': (62, 949),
    'upernet_vmamba_s.py': (82, 1028),
    'upernet_vmamba_b.py': (122, 1170),
    'upernet_vmamba_v0_t.py': (55, 964),
    'upernet_mlla_b.py': (128, 1183),
}


@pytest.fixture
def quick_init(monkeypatch):
    """Weights do not matter here, and drawing them takes the most time."""
    monkeypatch.setattr(nn.init, 'trunc_normal_', lambda x, **kwargs: x)
    monkeypatch.setattr(nn.init, 'kaiming_uniform_', lambda x, **kwargs: x)


@pytest.mark.parametrize(
    'name, giga',
    [
        ('vmamba_t_s1l8', 4.9),
        ('vmamba_s_s2l15', 8.7),
        ('vmamba_b_s2l15', 15.4),
        ('vmamba_t_v0', 5.6),
        ('mlla_t', 4.2),
        ('mlla_s', 7.3),
        ('mlla_b', 16.2),
    ],
)
def test_published_classifiers(name, giga, quick_init):
    flops = count_flops(mmvssm.build_classifier(name)).flops
    assert flops / 1e9 == pytest.approx(giga, rel=0.013)


@pytest.mark.parametrize('name', CONFIGS)
def test_published_segmentors(name, quick_init):
    pytest.importorskip('mmseg')
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    from mmvssm.engine import load_config
    from tiny import REPO

    init_default_scope('mmseg')
    cfg = load_config(str(REPO / 'configs' / name))
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    found = count_flops(model, (1, 3, 512, 2048))
    mega, giga = CONFIGS[name]
    # The published figure counts the auxiliary head's parameters ...
    assert found.params / 1e6 == pytest.approx(mega, rel=0.01)
    assert round(found.params / 1e6) == mega
    # ... but not its FLOPs.
    assert found.flops / 1e9 == pytest.approx(giga, rel=0.001)


@pytest.mark.parametrize('gated', [False, True])
def test_terms_of_ss2d(gated):
    """Every term written out for one mixer."""
    from mmvssm.layers import SS2D

    channels, states, ratio = 32, 4, 2
    inner, rank, pixels = ratio * channels, 2, 6 * 10
    found = count_flops(SS2D(channels, states, ratio, gated), (2, channels, 6, 10))
    terms = found.by_operator
    assert terms['ss2d_scan: scan'] == 2 * pixels * (9 * 4 * inner * states + 4 * inner)
    assert terms['ss2d_scan: projections'] == 2 * pixels * 4 * inner * (
        rank + 2 * states + rank
    )
    assert terms['convolution'] == 2 * pixels * 9 * inner
    assert terms['native_layer_norm'] == 2 * pixels * 5 * inner
    in_and_out = channels * inner * (3 if gated else 2)
    # The one with the compiled kernels, the other without.
    products = terms['linear']
    assert products == 2 * pixels * in_and_out
    assert found.flops == sum(found.by_operator.values())


@pytest.mark.parametrize('backend', ['torch', 'cpu'])
def test_terms_of_bidirectional_scan(backend):
    """Every term written out for one block; the norm is free."""
    from mmvssm.layers import MambaBlock

    if mmvssm.ops.backend_status()[backend]:
        pytest.skip(mmvssm.ops.backend_status()[backend])

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = MambaBlock(32, d_state=4)

        def forward(self, x):
            return self.block(x.flatten(2).mT, None)[0]

    inner, rank, positions = 64, 2, 2 * 15
    with mmvssm.ops.use_backend(backend):
        found = count_flops(Net(), (2, 32, 3, 5))
    products = found.by_operator.pop('linear')
    assert products == positions * 32 * inner * 3
    assert found.by_operator.pop('add_rms_norm', 0) == 0
    assert found.by_operator == {
        'bidirectional_scan: convolutions': positions * 2 * inner * 4,
        'bidirectional_scan: projections': positions * 2 * inner * (rank + 8 + rank),
        'bidirectional_scan: scans': positions * (2 * inner * (9 * 4 + 1) + inner),
    }


@pytest.mark.parametrize('backend', ['torch', 'cpu'])
def test_vim_agrees_with_mmengine(backend):
    """But for the convolutions, which tensor code has as free products.

    A traced model serves all sizes, so it always resizes its position embeddings.
    """
    from mmengine.analysis import FlopAnalyzer

    if mmvssm.ops.backend_status()[backend]:
        pytest.skip(mmvssm.ops.backend_status()[backend])

    arch = dict(embed_dims=192, depth=2)
    net = mmvssm.backbones.Vim(arch, out_indices=(1,)).eval()
    analyzer = FlopAnalyzer(net, torch.rand(1, 3, 224, 224))
    analyzer.set_op_handle(**SCAN_HANDLES).unsupported_ops_warnings(False)
    found = count_flops(net, (1, 3, 224, 224)).flops
    with mmvssm.ops.use_backend(backend):
        resized = analyzer.by_operator()['einsum']
        assert analyzer.total() - resized == pytest.approx(
            found, rel=0.05 if backend == 'torch' else 0.001
        )
    # Rows, then columns, of 14 x 14 positions with 192 channels.
    assert resized == pytest.approx(2 * 14 * 14 * 14 * 192, rel=0.001)


class Dispatched(TorchDispatchMode):
    """Counts what has a handle, as ptflops does with its backend 'aten'."""

    def __init__(self):
        super().__init__()
        self.flops, self.unknown = Counter(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        op = func._overloadpacket
        if op in DISPATCH_HANDLES:
            outputs = out if isinstance(out, tuple) else (out,)
            self.flops[op.__name__] += DISPATCH_HANDLES[op](args, outputs)
        elif func.namespace == 'mmvssm':
            self.unknown.add(str(op))
        return out


@pytest.mark.parametrize('family', FAMILIES)
def test_handles_of_calls_are_what_our_ops_cost(family):
    """Where each op runs as a whole."""
    if mmvssm.ops.backend_status()['cpu']:
        pytest.skip(mmvssm.ops.backend_status()['cpu'])
    net = FAMILIES[family]().eval()
    image = torch.zeros(2, 3, 32, 48)
    with mmvssm.ops.use_backend('cpu'), torch.no_grad(), Dispatched() as calls:
        net(image)
    ours = Counter()
    for name, flops in count_flops(net, image.shape).by_operator.items():
        ours[name.split(':')[0]] += flops
    assert not calls.unknown
    assert calls.flops['linear'] > 0
    assert calls.flops == {name: ours[name] for name in calls.flops}


def test_terms_of_linear_attention():
    """Every product written out for one layer, on a short and on a long map."""
    from mmvssm.layers import LinearAttention2d

    channels, heads = 32, 4
    for pixels, size in ((2 * 60, (6, 10)), (2 * 9900, (90, 110))):
        layer = LinearAttention2d(channels, heads)
        found = count_flops(layer, (2, channels, *size))
        assert found.by_operator['convolution'] == pixels * 9 * channels
        # The state, its products with the queries, the normaliser.
        each = channels // heads
        attention = pixels * channels * (each + each + 1)
        projections = pixels * channels * 2 * channels
        assert found.flops == pixels * 9 * channels + attention + projections


@pytest.mark.parametrize(
    'backend,op', [('torch', 'selective_scan'), ('cpu', 'ss2d_scan')]
)
def test_agrees_with_mmengine(backend, op):
    """mmengine's tracing counter, given the scan, finds about the same."""
    from mmengine.analysis import FlopAnalyzer

    if mmvssm.ops.backend_status()[backend]:
        pytest.skip(mmvssm.ops.backend_status()[backend])

    net = mmvssm.build_backbone('vmamba_t_v0', out_indices=(0, 1)).eval()
    analyzer = FlopAnalyzer(net, torch.rand(1, 3, 32, 48))
    analyzer.set_op_handle(**SCAN_HANDLES).unsupported_ops_warnings(False)
    # It counts what the projections pad, and reads the cost of an einsum from
    # a rounded printout.
    found = count_flops(net, (1, 3, 32, 48)).flops
    with mmvssm.ops.use_backend(backend):
        assert analyzer.total() == pytest.approx(found, rel=0.01)
        assert analyzer.by_operator()[op] > 0


def test_torch_flop_counter_finds_the_scan():
    u = torch.rand(2, 6, 5)
    B = torch.rand(2, 3, 4, 5)
    with FlopCounterMode(display=False) as counter:
        mmvssm.ops.selective_scan(u, u, -torch.rand(6, 4), B, B, z=u)
    assert counter.get_total_flops() == scan_flops(2, 6, 5, 4, skip=False, gate=True)


def test_torch_flop_counter_finds_ss2d():
    """It counts two for every multiply-add outside the scan."""
    x = torch.rand(2, 8, 3, 5)
    weights = [torch.rand(*s) for s in ((4, 2 + 2 * 1, 8), (4, 8, 2), (4, 8))]
    A, D = -torch.rand(32, 1), torch.rand(32)
    pixels, scan = 2 * 15, scan_flops(2, 32, 15, 1)
    for backend in ('torch', 'cpu'):
        if mmvssm.ops.backend_status()[backend]:
            continue
        with FlopCounterMode(display=False) as counter:
            mmvssm.ops.ss2d_scan(x, *weights, A, D, backend=backend)
        products = 2 * pixels * (4 * 4 * 8 + 4 * 8 * 2)
        assert counter.get_total_flops() == products + scan, backend


def test_torch_flop_counter_finds_a_block():
    if mmvssm.ops.backend_status()['cpu']:
        pytest.skip(mmvssm.ops.backend_status()['cpu'])
    from mmvssm.layers import MambaBlock

    block, x = MambaBlock(32, d_state=4), torch.rand(2, 15, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block(x, x)
    inner, rank = 64, 2
    weights = 32 * inner * 3 + 2 * inner * (4 + rank + 8 + rank)
    scans = 2 * inner * (9 * 4 + 1) + inner
    assert counter.get_total_flops() == 30 * (2 * weights + scans)


def test_model_is_left_as_it_was():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
    net[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    result = count_flops(net, (2, 3, 5, 7))
    assert result.by_operator == dict(
        convolution=2 * 35 * 12, native_batch_norm=2 * 35 * 4 * 2
    )
    assert net.training and not net[1].training and net[2].training
    after = net.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_an_op_without_formula_is_not_passed_over():
    @torch.library.custom_op('mmvssm::uncounted', mutates_args=())
    def uncounted(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    uncounted.register_fake(torch.empty_like)

    class Net(nn.Module):
        def forward(self, x):
            return uncounted(x)

    with pytest.raises(NotImplementedError, match='uncounted'):
        count_flops(Net(), (1, 3, 4, 4))
