"""FLOPs of detectors, and the picture of what they find."""

import numpy as np
import pytest
from PIL import Image
from torch import nn

from mmvssm.analysis.detection_sheet import Objects, write_detection_sheet
from mmvssm.analysis.detectors import CountableDetector
from mmvssm.analysis.flops import count_flops
from tiny import REPO
from tiny_det import needs_detection

PUBLISHED = {
    # parameters (M) and FLOPs (G) at 1280x800. The published repository says 384 G
    # of S, the paper 349 G.
    'mask_rcnn_vmamba_t_1x': (50, 271),
    'mask_rcnn_vmamba_s_1x': (70, 349),
    'mask_rcnn_vmamba_b_1x': (108, 485),
    'mask_rcnn_mlla_t_1x': (44, 255),
    'mask_rcnn_mlla_s_1x': (63, 319),
    'mask_rcnn_mlla_b_1x': (115, 502),
}
CLASSES = ('disc', 'square')
PALETTE = ([10, 200, 30], [220, 40, 50])


@needs_detection
@pytest.mark.parametrize('name', PUBLISHED)
def test_published_detectors(name, monkeypatch):
    from mmengine.config import Config

    from tiny_det import build

    for draw in ('trunc_normal_', 'kaiming_uniform_', 'kaiming_normal_'):
        monkeypatch.setattr(nn.init, draw, lambda x, **kwargs: x)
    model = build(Config.fromfile(REPO / f'configs/{name}.py'))
    found = count_flops(CountableDetector(model), (1, 3, 800, 1280))
    mega, giga = PUBLISHED[name]
    assert round(found.params / 1e6) == mega
    assert found.flops / 1e9 == pytest.approx(giga, rel=0.003)


@needs_detection
def test_heads_by_hand():
    """A cascade's heads count for each of its stages."""
    from mmengine.config import Config

    from tiny_det import build, shrink

    cfg = shrink(Config.fromfile(REPO / 'configs/mask_rcnn_vmamba_t_1x.py'))
    model = CountableDetector(build(cfg))
    whole = count_flops(model, (1, 3, 64, 64)).flops
    model.roi_head.bbox_head.shared_fcs[1] = nn.Identity()
    fewer = count_flops(model, (1, 3, 64, 64)).flops
    assert whole - fewer == 1000 * 32 * 32
    model.roi_head.mask_head.convs[1] = nn.Identity()
    assert fewer - count_flops(model, (1, 3, 64, 64)).flops == 100 * 14**2 * 9 * 16**2


def test_one_stage_detectors_are_refused():
    with pytest.raises(ValueError, match='Linear has no rpn_head'):
        CountableDetector(nn.Linear(1, 1))


def objects(*boxes, labels, scores=None, size=(40, 60)):
    masks = np.zeros((len(boxes), *size), bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes):
        mask[top:bottom, left:right] = True
    return Objects(np.array(boxes, float).reshape(-1, 4), masks, labels, scores)


def test_objects_have_the_colours_of_their_classes(tmp_path):
    image = np.zeros((40, 60, 3), np.uint8)
    box = (10, 5, 50, 35)
    path = write_detection_sheet(
        tmp_path / 'deep/sheet.png',
        [image, image],
        [objects(box, labels=[0]), objects(labels=[])],
        [objects(box, labels=[1], scores=[0.9]), objects(labels=[], scores=[])],
        CLASSES,
        PALETTE,
    )
    picture = np.asarray(Image.open(path).convert('RGB')).astype(int)
    columns = []
    for colour in PALETTE:
        # A mask is translucent, on black here.
        mixed = np.array(colour) * 0.45
        hits = np.argwhere(np.abs(picture - mixed).max(-1) <= 2)
        assert len(hits) > 0.02 * picture[..., 0].size
        columns.append(np.median(hits[:, 1]))
    # Truth left of prediction.
    assert columns[0] < columns[1]


def test_samples_that_do_not_fit_together(tmp_path):
    for images, truths in (([], []), ([np.zeros((4, 4, 3), np.uint8)], [])):
        with pytest.raises(ValueError, match='as many images as truths'):
            write_detection_sheet(
                tmp_path / 'sheet.png', images, truths, truths, CLASSES, PALETTE
            )


@needs_detection
def test_sheet_of_a_detector(tmp_path):
    from mmengine.config import Config
    from mmengine.registry import DATASETS

    from mmvssm.analysis.detection_sheet import write_detector_sheet
    from tiny_det import build, write_coco, write_config

    root = write_coco(tmp_path / 'coco')
    cfg = Config.fromfile(write_config(tmp_path / 'tiny.py', root))
    model = build(cfg)
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    assert model.training
    path = write_detector_sheet(tmp_path / 'sheet.png', model, dataset, score=0.0)
    assert model.training
    assert len(Image.open(path).convert('RGB').getcolors(2**24)) > 50
