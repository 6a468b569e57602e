import math

import pytest
import torch
from mmengine.registry import MODELS as MMENGINE_MODELS

from mmvssm.necks import PlainPyramid


@pytest.mark.parametrize('learned', [True, False])
@pytest.mark.parametrize('size', [(4, 6), (5, 1), (1, 1)])
def test_sizes(learned, size):
    torch.manual_seed(0)
    neck = PlainPyramid(8, learned)
    maps = [torch.randn(2, 8, *size, requires_grad=True) for _ in range(4)]
    outs = neck(maps)
    assert [tuple(x.shape[2:]) for x in outs] == [
        tuple(4 * s for s in size),
        tuple(2 * s for s in size),
        size,
        tuple((s + 1) // 2 for s in size),
    ]
    sum(x.square().mean() for x in outs).backward()
    assert all(p.grad.isfinite().all() for p in (*neck.parameters(), *maps))
    assert bool(list(neck.parameters())) is learned


def test_one_map_serves_every_scale():
    neck = PlainPyramid(8).eval()
    x = torch.randn(1, 8, 4, 4)
    for a, b in zip(neck([x]), neck([x] * 4), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match='4 maps, or one, got 3'):
        neck([x] * 3)


@pytest.mark.parametrize('learned', [True, False])
@pytest.mark.parametrize('scales', [(2, 1, 0.5, 0.25), (0.25, 2), (4,), (1,)])
def test_other_scales(learned, scales):
    neck = PlainPyramid(8, learned, scales)
    outs = neck([torch.randn(1, 8, 5, 4, requires_grad=True)])
    assert [tuple(x.shape[2:]) for x in outs] == [
        (math.ceil(5 * scale), math.ceil(4 * scale)) for scale in scales
    ]
    # Nothing is there that no loss reaches.
    sum(x.square().mean() for x in outs).backward()
    assert all(p.grad is not None for p in neck.parameters())


@pytest.mark.parametrize('scales', [(8, 4, 2, 1), (1, 1), (3,)])
def test_wrong_scales(scales):
    with pytest.raises(ValueError, match=r'scales must be some of .*, got \('):
        PlainPyramid(8, scales=scales)


@pytest.mark.parametrize('scales', [(4, 2, 1, 0.5), (2, 1, 0.5, 0.25)])
def test_same_names_and_numbers_as_mmseg(scales):
    pytest.importorskip('mmseg')
    from mmseg.models.necks import Feature2Pyramid

    torch.manual_seed(0)
    theirs = Feature2Pyramid(8, scales, norm_cfg=dict(type='BN')).eval()
    ours = PlainPyramid(8, scales=scales).eval()
    ours.load_state_dict(theirs.state_dict())
    maps = [torch.randn(1, 8, 4, 8) for _ in range(4)]
    for a, b in zip(ours(maps), theirs(maps), strict=True):
        torch.testing.assert_close(a, b)


def test_registry():
    neck = MMENGINE_MODELS.build(
        dict(type='mmvssm.PlainPyramid', channels=8, learned=False)
    )
    assert isinstance(neck, PlainPyramid) and not neck.learned


@pytest.mark.parametrize('scales, least', [((4, 2, 1, 0.5), 2), ((2, 1, 0.5, 0.25), 4)])
def test_mmsegs_pyramid_says_what_is_too_small(scales, least):
    pytest.importorskip('mmseg')
    from mmseg.models.necks import Feature2Pyramid

    options = dict(embed_dim=8, rescales=list(scales), norm_cfg=dict(type='BN'))
    own = MMENGINE_MODELS.build(dict(options, type='mmvssm.Feature2Pyramid')).eval()
    theirs = Feature2Pyramid(**options).eval()
    theirs.load_state_dict(own.state_dict())
    maps = [torch.randn(1, 8, least, least + 1)] * 4
    assert isinstance(own, Feature2Pyramid)
    assert all(map(torch.equal, own(maps), theirs(maps)))
    for size in ((least - 1, 9), (9, least - 1)):
        with pytest.raises(
            ValueError, match=rf'{least}x{least} patches, got {size[0]}x'
        ):
            own([torch.randn(1, 8, *size)] * 4)
