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
    with pytest.raises(ValueError, match='four maps, or one, got 3'):
        neck([x] * 3)


def test_same_names_and_numbers_as_mmseg():
    pytest.importorskip('mmseg')
    from mmseg.models.necks import Feature2Pyramid

    theirs = Feature2Pyramid(8, norm_cfg=dict(type='BN')).eval()
    ours = PlainPyramid(8).eval()
    ours.load_state_dict(theirs.state_dict())
    maps = [torch.randn(1, 8, 4, 6) for _ in range(4)]
    for a, b in zip(ours(maps), theirs(maps), strict=True):
        torch.testing.assert_close(a, b)


def test_registry():
    neck = MMENGINE_MODELS.build(
        dict(type='mmvssm.PlainPyramid', channels=8, learned=False)
    )
    assert isinstance(neck, PlainPyramid) and not neck.learned
