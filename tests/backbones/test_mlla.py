import pytest
import torch
import torch.nn.functional as F
from mmengine.model import convert_sync_batchnorm
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from mmvssm.backbones import MLLA, hierarchical
from mmvssm.backbones.mlla import ARCH_ZOO, Downsample, Stem
from mmvssm.layers import DropPath, MLLABlock

TINY = dict(depths=(1, 2, 1, 1), dims=8, num_heads=(2, 2, 4, 4), drop_path_rate=0.0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def loss(maps):
    return sum(x.square().mean() for x in maps)


def randomise(net):
    """The published initialisation makes the branches too small to see."""
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif name.endswith('bias'):
            nn.init.normal_(parameter, std=0.1)
    return net


# ------------------------------------------------------------- shapes and sizes
@pytest.mark.parametrize(
    'size, sizes',
    [
        ((64, 96), [(16, 24), (8, 12), (4, 6), (2, 3)]),
        ((33, 47), [(9, 12), (5, 6), (3, 3), (2, 2)]),
        ((4, 65), [(1, 17), (1, 9), (1, 5), (1, 3)]),
        ((1, 1), [(1, 1)] * 4),
    ],
    ids=str,
)
def test_sizes(size, sizes):
    net = MLLA(TINY)
    maps = net(torch.randn(2, 3, *size))
    assert [x.shape for x in maps] == [(2, 8 * 2**i, *s) for i, s in enumerate(sizes)]
    assert all(x.is_contiguous() and x.isfinite().all() for x in maps)
    loss(maps).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_wrong_inputs():
    net = MLLA(TINY)
    for shape in ((3, 32, 32), (1, 4, 32, 32), (1, 3, 0, 32), (1, 3, 32, 0)):
        with pytest.raises(ValueError, match=r'MLLA .*B, 3, H, W.*at least 1x1'):
            net(torch.zeros(shape))


def test_other_channels():
    net = MLLA(TINY, in_channels=5)
    assert net(torch.randn(2, 5, 32, 32))[0].shape == (2, 8, 8, 8)


def test_images_are_padded_below_and_to_the_right():
    net = randomise(MLLA(TINY)).eval()
    x = torch.randn(1, 3, 62, 93)
    for a, b in zip(net(x), net(F.pad(x, (0, 3, 0, 2))), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    'memory_format', [torch.contiguous_format, torch.channels_last]
)
def test_channels_last_from_the_first_layer(memory_format):
    net = MLLA(TINY)
    formats = []
    for layer in (net.patch_embed.conv1, *net.layers, *net.layers[1].blocks):
        layer.register_forward_pre_hook(
            lambda _, inputs: formats.append(
                inputs[0].is_contiguous(memory_format=torch.channels_last)
            )
        )
    net(torch.randn(2, 3, 62, 93).to(memory_format=memory_format))
    assert formats == [True] * 7


def test_samples_do_not_depend_on_one_another():
    net = randomise(MLLA(TINY)).eval()
    x = torch.randn(2, 3, 40, 28)
    for a, b in zip(net(x), net(x[1:]), strict=True):
        torch.testing.assert_close(a[1:], b, rtol=1e-4, atol=1e-5)


def test_positions_are_those_of_the_map_at_hand():
    """The same net on maps of other sizes, and back."""
    net = randomise(MLLA(TINY)).eval()
    small, large = torch.randn(1, 3, 32, 64), torch.randn(1, 3, 64, 32)
    first, other, again = net(small)[0], net(large)[0], net(small)[0]
    assert torch.equal(first, again) and other.shape == (1, 8, 16, 8)
    # Rows and columns are told apart.
    turned = net(small.mT.contiguous())[0].mT
    assert not torch.allclose(turned, first, atol=1e-2)


# ------------------------------------------------------------------- the layers
def conv(layer, x, **options):
    return F.conv2d(x, layer.conv.weight, layer.conv.bias, **options)


def norm(layer, x):
    n = layer.norm
    return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, eps=1e-5)


def test_stem_by_its_parts():
    stem = randomise(Stem(3, 8)).eval()
    x = torch.randn(2, 3, 16, 24)
    y = norm(stem.conv1, conv(stem.conv1, x, stride=2, padding=1)).relu()
    first, second = stem.conv2
    z = norm(first, conv(first, y, padding=1)).relu()
    y = y + norm(second, conv(second, z, padding=1))
    first, second = stem.conv3
    y = norm(first, conv(first, y, stride=2, padding=1)).relu()
    assert y.shape == (2, 32, 4, 6)
    torch.testing.assert_close(stem(x), norm(second, conv(second, y)))
    assert not any(key.endswith('conv.bias') for key in stem.state_dict())


def test_downsampling_pads_in_front_of_its_first_layer():
    layer = randomise(Downsample(4, 8)).eval()
    x = torch.randn(2, 4, 5, 7)
    padded = x.new_zeros(2, 4, 6, 8)
    padded[:, :, :5, :7] = x
    first, second, third = layer.conv
    y = conv(first, padded).relu()
    # What was padded is the bias by now.
    torch.testing.assert_close(y[0, :, 5, 7], first.conv.bias.relu())
    y = conv(second, y, stride=2, padding=1, groups=32).relu()
    want = norm(third, conv(third, y))
    torch.testing.assert_close(layer(x), want)
    assert layer(x).shape == (2, 8, 3, 4)
    assert isinstance(first.norm, nn.Identity) and isinstance(second.norm, nn.Identity)


def test_block_by_its_parts():
    block = randomise(MLLABlock(8, 2)).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    y = x + block.cpe1(x)
    n = block.norm1(y)
    mixed = block.attn(F.silu(block.dwc(block.in_proj(n))))
    y = y + block.out_proj(mixed * F.silu(block.act_proj(n)))
    y = y + block.cpe2(y)
    torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)))


def test_position_encodings_are_never_dropped():
    block = randomise(MLLABlock(8, 2, drop_path=0.9)).train()
    x = torch.randn(1, 8, 3, 5)
    y = x + block.cpe1(x)
    y = y + block.cpe2(y)
    torch.manual_seed(1)
    outs = [block(x) for _ in range(10)]
    assert any(torch.allclose(out, y) for out in outs)


def test_batch_norms_are_found_by_sync_bn_conversion():
    net = MLLA(TINY)
    names = {n for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    # Five in the stem, one each in three downsamplings.
    assert len(names) == 8
    for converted in (
        nn.SyncBatchNorm.convert_sync_batchnorm(MLLA(TINY)),
        convert_sync_batchnorm(MLLA(TINY), 'torch'),
    ):
        found = {
            n for n, m in converted.named_modules() if isinstance(m, nn.SyncBatchNorm)
        }
        assert found == names


# -------------------------------------------------------------------- precision
def test_autocast():
    net = randomise(MLLA(TINY))
    x = torch.randn(2, 3, 64, 64)
    # One pass in training mode would shift the running statistics.
    net.eval()
    want = net(x)
    with torch.autocast('cpu', torch.bfloat16):
        maps = net(x)
    loss(maps).backward()
    for got, full in zip(maps, want, strict=True):
        assert (got - full).abs().max() < 0.1 * full.abs().max()
    assert all(
        p.grad.isfinite().all() and p.grad.dtype == torch.float32
        for p in net.parameters()
    )


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_weights_without_autocast(dtype):
    net = MLLA(TINY).to(dtype).eval()
    maps = net(torch.randn(1, 3, 32, 32, dtype=dtype))
    assert all(x.dtype == dtype and x.isfinite().all() for x in maps)


def test_inference_mode_then_training():
    """Tables made without gradients serve training, too."""
    net = MLLA(TINY)
    x = torch.randn(2, 3, 28, 44)
    with torch.inference_mode():
        net(x)
    loss(net(x)).backward()


# ------------------------------------------------------------- the mmseg options
@pytest.mark.parametrize('indices', [(0,), (1, 3), (2,), (0, 1, 2, 3)])
def test_out_indices(indices):
    full, net = MLLA(TINY).eval(), MLLA(TINY, out_indices=indices).eval()
    net.load_state_dict({key: full.state_dict()[key] for key in net.state_dict()})
    x = torch.randn(2, 3, 33, 47)
    maps = net(x)
    assert tuple(x.shape[1] for x in maps) == net.out_channels
    for i, out in zip(indices, maps, strict=True):
        torch.testing.assert_close(out, full(x)[i])
    loss(maps).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize('indices', [(), (4,), (-1,), (1, 0), (1, 1)])
def test_wrong_out_indices(indices):
    with pytest.raises(ValueError, match='out_indices'):
        MLLA(TINY, out_indices=indices)


@pytest.mark.parametrize('frozen', [-1, 0, 1, 2, 4])
def test_frozen_stages(frozen):
    net = MLLA(dict(TINY, drop_path_rate=0.5), frozen_stages=frozen)
    parts = {'patch_embed.': frozen >= 0}
    parts.update({f'layers.{i}.': i < frozen for i in range(4)})
    parts.update({f'norm{i}.': False for i in range(4)})
    statistics = {k: v.clone() for k, v in net.state_dict().items() if 'running' in k}
    for mode in (True, False, True):
        net.train(mode)
        for part, is_frozen in parts.items():
            training = net.get_submodule(part[:-1]).training
            assert training is (mode and not is_frozen), part
    loss(net(torch.randn(2, 3, 64, 64))).backward()
    for name, parameter in net.named_parameters():
        is_frozen = next(f for part, f in parts.items() if name.startswith(part))
        assert parameter.requires_grad is not is_frozen, name
        assert (parameter.grad is None) is is_frozen, name
    for name, value in statistics.items():
        is_frozen = next(f for part, f in parts.items() if name.startswith(part))
        assert torch.equal(net.state_dict()[name], value) is is_frozen, name


def test_wrong_frozen_stages():
    for frozen in (-2, 5):
        with pytest.raises(ValueError, match='frozen_stages'):
            MLLA(TINY, frozen_stages=frozen)


def test_with_cp_gives_the_same_gradients(monkeypatch):
    calls = []
    checkpoint = hierarchical.checkpoint
    monkeypatch.setattr(
        hierarchical,
        'checkpoint',
        lambda *args, **kwargs: calls.append(1) or checkpoint(*args, **kwargs),
    )
    arch = dict(TINY, drop_path_rate=0.5)
    plain, saving = MLLA(arch), MLLA(arch, with_cp=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 33, 47)
    for net in (plain, saving):
        # The same samples must be dropped, also in the recomputation.
        torch.manual_seed(1)
        loss(net(x)).backward()
    assert len(calls) == 5
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(saving.state_dict()[name], value, msg=name)


@pytest.mark.parametrize('indices', [(0, 1, 2, 3), (1,)])
def test_drop_path_rates(indices):
    def rates(net):
        return [m.drop_prob for m in net.modules() if isinstance(m, DropPath)]

    expected = [0, 0.1, 0.2, 0.3, 0.4]
    net = MLLA(dict(TINY, drop_path_rate=0.4), out_indices=indices)
    assert rates(net) == pytest.approx(expected[: len(rates(net))])
    assert rates(MLLA(TINY, drop_path_rate=0.4)) == pytest.approx(expected)


def test_without_output_norms():
    net = MLLA(TINY, out_indices=(1, 3), out_norm=False)
    assert not [key for key in net.state_dict() if key.startswith('norm')]
    assert len(net(torch.randn(2, 3, 64, 64))) == 2


# --------------------------------------------------------- arch, names, registry
def test_registry():
    net = MMENGINE_MODELS.build(
        dict(type='mmvssm.MLLA', arch=TINY, out_indices=(0, 2), img_size=512)
    )
    assert isinstance(net, MLLA) and net.out_channels == (8, 32)


@pytest.mark.parametrize(
    'arch, message',
    [
        ('x', "unknown arch 'x' of MLLA.*'b', 's', 't'"),
        (dict(depths=(1, 1), dims=8), "missing keys .'num_heads'"),
        (dict(TINY, ssm_ratio=1), "unknown keys .'ssm_ratio'"),
        (dict(TINY, dims=[8, 16, 32, 64]), 'channels of the first stage'),
        (dict(TINY, dims=6), 'multiple of 4'),
        (dict(TINY, depths=(1, 0, 1, 1)), 'blocks of each stage'),
        (dict(TINY, num_heads=4), 'num_heads .* each of the 4 stages, got 4'),
        (dict(TINY, num_heads=(2, 2, 2)), r'num_heads .* got \(2, 2, 2\)'),
        (dict(TINY, num_heads=(3, 2, 2, 2)), 'heads must divide the 8 channels'),
    ],
)
def test_wrong_arch(arch, message):
    with pytest.raises(ValueError, match=message):
        MLLA(arch)


def test_published_drop_path_rates():
    rates = {name: arch['drop_path_rate'] for name, arch in ARCH_ZOO.items()}
    assert rates == dict(t=0.2, s=0.3, b=0.5)


# ------------------------------------------------- initialisation, weight decay
@torch.no_grad()
def test_initialisation():
    net = MLLA(dict(TINY, dims=64))
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear):
            assert layer.weight.std() == pytest.approx(0.02, rel=0.1), name
            assert not layer.bias.any()
        elif isinstance(layer, nn.LayerNorm | nn.BatchNorm2d):
            assert (layer.weight == 1).all() and not layer.bias.any()
            assert layer.eps == 1e-5
        elif isinstance(layer, nn.Conv2d):
            bound = layer.weight[0].numel() ** -0.5
            assert 0.9 * bound < layer.weight.abs().max() <= bound, name


def test_no_weight_decay():
    net = MLLA(TINY)
    exempt = net.no_weight_decay()
    block = 'layers.0.blocks.0.'
    assert {
        'patch_embed.conv1.norm.weight',
        'layers.0.downsample.conv.0.conv.bias',
        'norm0.weight',
        block + 'norm1.weight',
        block + 'attn.qk.bias',
        block + 'cpe1.bias',
    } <= exempt
    assert exempt.isdisjoint(
        block + name for name in ('attn.qk.weight', 'cpe1.weight', 'in_proj.weight')
    )
    assert exempt <= {name for name, _ in net.named_parameters()}
