import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS as MMENGINE_MODELS

from mmvssm.necks import SimpleFeaturePyramid


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize('size', [(4, 6), (5, 1), (1, 1)])
@pytest.mark.parametrize('num_outs', [4, 5, 6])
def test_sizes(size, num_outs):
    neck = SimpleFeaturePyramid(8, 16, num_outs)
    x = torch.randn(2, 8, *size, requires_grad=True)
    outs = neck([x])
    wanted = [tuple(factor * s for s in size) for factor in (4, 2, 1)]
    for _ in range(num_outs - 3):
        wanted.append(tuple((s + 1) // 2 for s in wanted[-1]))
    assert [tuple(out.shape) for out in outs] == [(2, 16, *s) for s in wanted]
    # mmcv's RoIAlign reads the memory as NCHW without asking.
    assert all(out.is_contiguous() for out in outs)
    sum((out * torch.randn_like(out)).sum() for out in outs).backward()
    assert all(
        p.grad.isfinite().all() and p.grad.any() for p in (*neck.parameters(), x)
    )


def test_last_levels_against_their_definition():
    neck = SimpleFeaturePyramid(8, 16).eval()
    x = torch.randn(1, 8, 6, 4)
    level = neck.levels[3]
    out = F.max_pool2d(x, 2)
    for i, padding in ((1, 0), (2, 1)):
        out = F.conv2d(out, level[i].weight, padding=padding)
        centred = out - out.mean(1, keepdim=True)
        out = centred / (out.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    found = neck([x])
    torch.testing.assert_close(found[3], out)
    assert torch.equal(found[4], found[3][:, :, ::2, ::2])


def test_enlarged_levels_against_their_definition():
    neck = SimpleFeaturePyramid(8, 16).eval()
    x = torch.randn(1, 8, 2, 3)
    up = neck.levels[0]
    half = F.conv_transpose2d(x, up[0].weight, up[0].bias, stride=2)
    half = F.layer_norm(half.movedim(1, -1), (4,), eps=1e-6).movedim(-1, 1)
    quarter = F.conv_transpose2d(F.gelu(half), up[3].weight, up[3].bias, stride=2)
    torch.testing.assert_close(neck([x])[0], up[5](up[4](quarter)).contiguous())


@pytest.mark.parametrize('bad', [dict(in_channels=6), dict(in_channels=8, num_outs=3)])
def test_refused(bad):
    with pytest.raises(ValueError, match='SimpleFeaturePyramid needs'):
        SimpleFeaturePyramid(**bad)


def test_takes_one_map():
    maps = [torch.randn(1, 8, 2, 2)] * 4
    with pytest.raises(ValueError, match='takes one map, got 4'):
        SimpleFeaturePyramid(8)(maps)


def test_registry():
    neck = MMENGINE_MODELS.build(
        dict(type='mmvssm.SimpleFeaturePyramid', in_channels=8, out_channels=4)
    )
    assert isinstance(neck, SimpleFeaturePyramid) and neck.num_outs == 5


def test_its_norm_goes_into_heads_of_openmmlab():
    bricks = pytest.importorskip('mmcv.cnn')
    from mmvssm.layers import LayerNorm2d

    conv = bricks.ConvModule(
        4, 8, 3, norm_cfg=dict(type='mmvssm.LayerNorm2d', eps=1e-6)
    )
    assert isinstance(conv.norm, LayerNorm2d) and conv.norm.eps == 1e-6
    assert conv.conv.bias is None
