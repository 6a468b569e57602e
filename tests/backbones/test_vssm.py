import math

import pytest
import torch
from mmengine.registry import MODELS as MMENGINE_MODELS

from mmvssm.backbones import VSSM, hierarchical
from mmvssm.backbones.vssm import ARCH_ZOO
from mmvssm.layers import SS2D, PatchMerging2d
from mmvssm.layers import ss2d as module
from mmvssm.ops import ss2d_scan

V2 = dict(depths=(1, 2, 1, 1), dims=8, drop_path_rate=0.0)
V0 = {**ARCH_ZOO['t_v0'], **V2, 'ssm_d_state': 4}
both = pytest.mark.parametrize('arch', [V2, V0], ids=['v2', 'v0'])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def loss(maps):
    return sum(x.square().mean() for x in maps)


# ------------------------------------------------------------- shapes and sizes
@pytest.mark.parametrize(
    'arch, size, sizes',
    [
        (V2, (64, 96), [(16, 24), (8, 12), (4, 6), (2, 3)]),
        (V2, (33, 47), [(9, 12), (5, 6), (3, 3), (2, 2)]),
        (V2, (4, 65), [(1, 17), (1, 9), (1, 5), (1, 3)]),
        (V2, (1, 1), [(1, 1)] * 4),
        (V0, (64, 96), [(16, 24), (8, 12), (4, 6), (2, 3)]),
        (V0, (33, 47), [(8, 11), (4, 6), (2, 3), (1, 2)]),
        (V0, (7, 65), [(1, 16), (1, 8), (1, 4), (1, 2)]),
        (V0, (4, 4), [(1, 1)] * 4),
    ],
    ids=lambda value: 'x'.join(map(str, value)) if type(value) is tuple else '',
)
def test_sizes(arch, size, sizes):
    net = VSSM(arch)
    maps = net(torch.randn(2, 3, *size))
    assert [x.shape for x in maps] == [(2, 8 * 2**i, *s) for i, s in enumerate(sizes)]
    assert all(x.is_contiguous() for x in maps)
    loss(maps).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize('arch, smallest', [(V2, 1), (V0, 4)], ids=['v2', 'v0'])
def test_wrong_inputs(arch, smallest):
    net = VSSM(arch)
    for shape in (
        (3, 32, 32),
        (1, 4, 32, 32),
        (1, 3, smallest - 1, 32),
        (1, 3, 32, smallest - 1),
    ):
        with pytest.raises(ValueError, match=r'B, 3, H, W.*at least'):
            net(torch.zeros(shape))


def test_other_channels():
    net = VSSM(V2, in_channels=5)
    assert net(torch.randn(1, 5, 32, 32))[0].shape == (1, 8, 8, 8)


@both
def test_memory_format_of_the_image_changes_nothing(arch):
    net = VSSM(arch).eval()
    x = torch.randn(2, 3, 33, 47)
    for a, b in zip(net(x), net(x.to(memory_format=torch.channels_last)), strict=True):
        assert torch.equal(a, b)


@both
def test_samples_do_not_depend_on_one_another(arch):
    net = VSSM(arch).eval()
    x = torch.randn(2, 3, 40, 28)
    for a, b in zip(net(x), net(x[1:]), strict=True):
        torch.testing.assert_close(a[1:], b)


# ------------------------------------------------------------------- the layers
def test_patch_merging_pads_below_and_to_the_right():
    merge = PatchMerging2d(3, 6)
    x = torch.randn(2, 3, 5, 7)
    padded = x.new_zeros(2, 3, 6, 8)
    padded[:, :, :5, :7] = x
    torch.testing.assert_close(merge(x), merge(padded))


def test_patch_merging_order():
    merge = PatchMerging2d(1, 4)
    merge.norm = torch.nn.Identity()
    merge.reduction = torch.nn.Identity()
    x = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    assert merge(x).flatten().tolist() == [0, 2, 1, 3]


def test_channels_last_from_the_first_layer():
    net = VSSM(V2)
    formats = []
    for layer in (net.patch_embed[0], *net.layers, *net.layers[1].blocks):
        layer.register_forward_pre_hook(
            lambda _, inputs: formats.append(
                inputs[0].is_contiguous(memory_format=torch.channels_last)
            )
        )
    net(torch.randn(2, 3, 64, 64))
    assert formats == [True] * 7


def test_one_scan_per_block_in_float32(monkeypatch):
    calls = []

    def record(*args, **kwargs):
        calls.append(args)
        return ss2d_scan(*args, **kwargs)

    monkeypatch.setattr(module, 'ss2d_scan', record)
    net = VSSM(V2).to(torch.bfloat16)
    net(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16))
    assert len(calls) == 5
    for x, *weights, dt_bias, A, Ds in calls:
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert {w.dtype for w in (x, *weights)} == {torch.bfloat16}
        assert dt_bias.dtype == A.dtype == Ds.dtype == torch.float32
        assert (A < 0).all()


@both
def test_autocast(arch, monkeypatch):
    dtypes = []

    def record(*args, **kwargs):
        out = ss2d_scan(*args, **kwargs)
        dtypes.append(out.dtype)
        return out

    monkeypatch.setattr(module, 'ss2d_scan', record)
    net = VSSM(arch)
    x = torch.randn(2, 3, 64, 64)
    want = net(x)
    # The published code norms in float32 and casts the result back to half.
    entered = []
    op = net.layers[0].blocks[0].op
    for layer in (op.out_norm, op.out_proj):
        layer.register_forward_pre_hook(
            lambda _, inputs: entered.append(inputs[0].dtype)
        )
    with torch.autocast('cpu', torch.bfloat16):
        maps = net(x)
    loss(maps).backward()
    assert set(dtypes) == {torch.float32}
    assert entered == [torch.float32, torch.bfloat16]
    for got, full in zip(maps, want, strict=True):
        assert (got - full).abs().max() < 0.2
    assert all(
        p.grad.isfinite().all() and p.grad.dtype == torch.float32
        for p in net.parameters()
    )


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_weights_without_autocast(dtype):
    net = VSSM(V0).to(dtype)
    maps = net(torch.randn(1, 3, 32, 32, dtype=dtype))
    assert all(x.dtype == dtype and x.isfinite().all() for x in maps)


# ------------------------------------------------------------- the mmseg options
@both
@pytest.mark.parametrize('indices', [(0,), (1, 3), (2,), (0, 1, 2, 3)])
def test_out_indices(arch, indices):
    full, net = VSSM(arch).eval(), VSSM(arch, out_indices=indices).eval()
    net.load_state_dict({key: full.state_dict()[key] for key in net.state_dict()})
    x = torch.randn(2, 3, 33, 47)
    maps = net(x)
    assert len(maps) == len(indices)
    assert tuple(x.shape[1] for x in maps) == net.out_channels
    for i, out in zip(indices, maps, strict=True):
        torch.testing.assert_close(out, full(x)[i])
    # Nothing is there that no loss reaches.
    loss(maps).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize('indices', [(), (4,), (-1,), (1, 0), (1, 1)])
def test_wrong_out_indices(indices):
    with pytest.raises(ValueError, match='out_indices'):
        VSSM(V2, out_indices=indices)


@both
@pytest.mark.parametrize('frozen', [-1, 0, 1, 2, 4])
def test_frozen_stages(arch, frozen):
    net = VSSM(dict(arch, drop_path_rate=0.5), frozen_stages=frozen)
    parts = {'patch_embed.': frozen >= 0}
    parts.update({f'layers.{i}.': i < frozen for i in range(4)})
    parts.update({f'outnorm{i}.': False for i in range(4)})
    for mode in (True, False, True):
        net.train(mode)
        for part, is_frozen in parts.items():
            assert net.get_submodule(part[:-1]).training is (mode and not is_frozen), (
                part
            )
    maps = net(torch.randn(2, 3, 32, 32))
    loss(maps).backward()
    for name, parameter in net.named_parameters():
        is_frozen = next(f for part, f in parts.items() if name.startswith(part))
        assert parameter.requires_grad is not is_frozen, name
        assert (parameter.grad is None) is is_frozen, name


def test_wrong_frozen_stages():
    for frozen in (-2, 5):
        with pytest.raises(ValueError, match='frozen_stages'):
            VSSM(V2, frozen_stages=frozen)
    with pytest.raises(ValueError, match='between -1 .* and 2'):
        VSSM(V2, out_indices=(1,), frozen_stages=3)


@both
@pytest.mark.parametrize('frozen', [-1, 1])
def test_with_cp_gives_the_same_gradients(arch, frozen, monkeypatch):
    calls = []
    checkpoint = hierarchical.checkpoint
    monkeypatch.setattr(
        hierarchical,
        'checkpoint',
        lambda *args, **kwargs: calls.append(1) or checkpoint(*args, **kwargs),
    )
    arch = dict(arch, drop_path_rate=0.5)
    plain = VSSM(arch, frozen_stages=frozen)
    saving = VSSM(arch, frozen_stages=frozen, with_cp=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 33, 47)
    for net in (plain, saving):
        # The same samples must be dropped, also in the recomputation.
        torch.manual_seed(1)
        loss(net(x)).backward()
    assert len(calls) == sum(arch['depths'])
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)
    with torch.no_grad():
        saving(x)
    assert len(calls) == sum(arch['depths'])


def test_drop_path_only_in_training():
    net = VSSM(dict(V2, drop_path_rate=0.8))
    # The published initialisation makes the branches too small to see.
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(4, 3, 32, 32)
    first, second = net(x)[-1], net(x)[-1]
    assert not torch.allclose(first, second)
    net.eval()
    assert torch.equal(net(x)[-1], net(x)[-1])


@pytest.mark.parametrize('indices', [(0, 1, 2, 3), (1,)])
def test_drop_path_rates(indices):

    def rates(net):
        return [
            block.drop_path.drop_prob for stage in net.layers for block in stage.blocks
        ]

    expected = [0, 0.1, 0.2, 0.3, 0.4]
    net = VSSM(dict(V2, drop_path_rate=0.4), out_indices=indices)
    assert rates(net) == pytest.approx(expected[: len(rates(net))])
    assert rates(VSSM(V2, drop_path_rate=0.4)) == pytest.approx(expected)
    assert set(rates(VSSM(dict(V2, drop_path_rate=0.4), drop_path_rate=0))) == {0}


@both
def test_without_output_norms(arch):
    net = VSSM(arch, out_indices=(1, 3), out_norm=False)
    assert not [key for key in net.state_dict() if 'outnorm' in key]
    assert len(net(torch.randn(1, 3, 32, 32))) == 2


# --------------------------------------------------------- arch, names, registry
def test_registry():
    net = MMENGINE_MODELS.build(
        dict(type='mmvssm.VSSM', arch=V2, out_indices=(0, 2), img_size=512)
    )
    assert isinstance(net, VSSM) and net.out_channels == (8, 32)


@pytest.mark.parametrize(
    'arch, message',
    [
        ('t', "unknown arch 't'.*t_s1l8"),
        (dict(depths=(1, 1)), "missing keys .'dims'"),
        (dict(V2, ssm_dstate=1), "unknown keys .'ssm_dstate'"),
        (dict(V2, dims=[8, 16, 32, 64]), 'channels of the first stage'),
        (dict(V2, depths=4), r'blocks of each stage, .* got 4'),
        (dict(V2, depths=(1, 0, 1, 1)), 'blocks of each stage'),
        (dict(V2, forward_type='v2'), 'forward_type must be one of'),
    ],
)
def test_wrong_arch(arch, message):
    with pytest.raises(ValueError, match=message):
        VSSM(arch)


def test_published_drop_path_rates():
    rates = {name: arch['drop_path_rate'] for name, arch in ARCH_ZOO.items()}
    assert rates == dict(
        t_v0=0.2,
        s_v0=0.3,
        b_v0=0.6,
        t_s2l5=0.2,
        s_s2l15=0.3,
        b_s2l15=0.6,
        t_s1l8=0.2,
        s_s1l20=0.3,
        b_s1l20=0.5,
    )


# ------------------------------------------------- initialisation, weight decay
@torch.no_grad()
def test_initialisation_of_the_scan():
    op = SS2D(96, d_state=16, ssm_ratio=2.0, gated=True)
    rank = 6
    assert op.x_proj_weight.shape == (4, rank + 32, 192)
    assert op.x_proj_weight.abs().max() <= 192**-0.5
    assert op.x_proj_weight.std() == pytest.approx(192**-0.5 / 3**0.5, rel=0.05)
    assert op.dt_projs_weight.abs().max() <= rank**-0.5
    assert op.dt_projs_weight.std() == pytest.approx(rank**-0.5 / 3**0.5, rel=0.05)
    step = torch.nn.functional.softplus(op.dt_projs_bias)
    assert 1e-3 * 0.99 <= step.min() and step.max() <= 0.1 * 1.01
    assert step.log().mean() == pytest.approx(math.log(1e-2), abs=0.15)
    torch.testing.assert_close(op.A_logs.exp(), torch.arange(1.0, 17).expand(768, 16))
    assert (op.Ds == 1).all() and op.conv2d.bias is not None
    assert not SS2D(8).A_logs.any() and SS2D(8).conv2d.bias is None


@both
@torch.no_grad()
def test_initialisation_of_the_rest(arch):
    net = VSSM(dict(arch, dims=64))
    for name, layer in net.named_modules():
        if isinstance(layer, torch.nn.Linear):
            assert layer.weight.std() == pytest.approx(0.02, rel=0.1), name
            assert layer.bias is None or not layer.bias.any()
        elif isinstance(layer, torch.nn.LayerNorm):
            assert (layer.weight == 1).all() and not layer.bias.any()
            assert layer.eps == 1e-5
        elif isinstance(layer, torch.nn.Conv2d):
            bound = (layer.weight[0].numel()) ** -0.5
            assert 0.9 * bound < layer.weight.abs().max() <= bound, name


def test_init_weights_keeps_the_initialisation():
    net = VSSM(V2)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.init_weights()
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_init_cfg_of_mmengine_still_works():
    net = VSSM(V2, init_cfg=dict(type='Constant', layer='Conv2d', val=3.0))
    net.init_weights()
    assert (net.patch_embed[0].weight == 3).all()


def test_no_weight_decay():
    net = VSSM(V2)
    exempt = net.no_weight_decay()
    op = 'layers.0.blocks.0.op.'
    assert {
        op + 'Ds',
        op + 'out_norm.weight',
        'patch_embed.0.bias',
        'outnorm0.weight',
        'layers.0.blocks.0.mlp.fc1.bias',
    } <= exempt
    assert exempt.isdisjoint(
        op + name
        for name in (
            'A_logs',
            'dt_projs_bias',
            'dt_projs_weight',
            'x_proj_weight',
            'in_proj.weight',
        )
    )
    assert exempt <= {name for name, _ in net.named_parameters()}
