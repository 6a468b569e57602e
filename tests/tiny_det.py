"""Detectors and COCO files small enough for a test."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmvssm.backbones.vssm import ARCH_ZOO
from mmvssm.compat import why_no_detection
from tiny import REPO

DETECTORS = sorted((REPO / 'configs').glob('*mask_rcnn_*.py'))
NO_DETECTION = why_no_detection()
needs_detection = pytest.mark.skipif(
    NO_DETECTION is not None, reason=f'no detection here: {NO_DETECTION}'
)
CHANNELS = 16
PLAIN = dict(embed_dims=16, depth=2)


def shrink(cfg):
    """One block a map and an eighth or less of the channels; same parts."""
    model = cfg.model
    # No file fits it.
    model.backbone.init_cfg = None
    if model.backbone.type == 'mmvssm.MLLA':
        model.backbone.arch = dict(depths=(1, 1, 1, 1), dims=8, num_heads=(1, 1, 2, 4))
        model.neck.in_channels = [8, 16, 32, 64]
    elif model.backbone.type == 'mmvssm.VSSM':
        arch = model.backbone.arch
        arch = ARCH_ZOO[arch] if isinstance(arch, str) else arch
        model.backbone.arch = dict(arch, depths=(1, 1, 1, 1), dims=8)
        model.neck.in_channels = [8, 16, 32, 64]
    else:
        model.backbone.arch = dict(PLAIN)
        model.backbone.out_indices = (PLAIN['depth'] - 1,)
        model.backbone.img_size = 64
        model.neck.in_channels = PLAIN['embed_dims']
    model.neck.out_channels = CHANNELS
    model.rpn_head.update(in_channels=CHANNELS, feat_channels=CHANNELS)
    # Proposals of the size of the images below.
    model.rpn_head.anchor_generator.scales = [2]
    heads = model.roi_head
    for kind in ('bbox', 'mask'):
        heads[f'{kind}_roi_extractor'].out_channels = CHANNELS
        of_stages = heads[f'{kind}_head']
        for head in of_stages if isinstance(of_stages, list) else [of_stages]:
            head.in_channels = CHANNELS
            if 'fc_out_channels' in head:
                head.fc_out_channels = 32
            if 'conv_out_channels' in head:
                head.conv_out_channels = CHANNELS
    if model.data_preprocessor.pad_size_divisor > 64:
        model.data_preprocessor.pad_size_divisor = 64
    model.train_cfg.rpn_proposal.update(nms_pre=100, max_per_img=40)
    model.test_cfg.rpn.update(nms_pre=100, max_per_img=20)
    stages = model.train_cfg.rcnn
    for stage in stages if isinstance(stages, list) else [stages]:
        stage.sampler.num = 16
    model.test_cfg.rcnn.score_thr = 0.0
    return cfg


def build(cfg):
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope('mmdet')
    torch.manual_seed(0)
    return revert_sync_batchnorm(MODELS.build(cfg.model))


def batch(boxes=((8, 8, 40, 36), (30, 20, 60, 50)), crowds=(), number=2, size=(64, 96)):
    """Random images with objects in these boxes (left, top, right, bottom)."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    def instances(chosen):
        masks = np.zeros((len(chosen), *size), np.uint8)
        for mask, (left, top, right, bottom) in zip(masks, chosen):
            mask[top:bottom, left:right] = 1
        return InstanceData(
            bboxes=torch.tensor(chosen, dtype=torch.float32).reshape(-1, 4),
            labels=torch.arange(len(chosen)),
            masks=BitmapMasks(masks, *size),
        )

    samples = []
    for _ in range(number):
        sample = DetDataSample(
            metainfo=dict(
                img_shape=size,
                ori_shape=size,
                pad_shape=size,
                batch_input_shape=size,
                scale_factor=(1.0, 1.0),
                img_path='',
            )
        )
        sample.gt_instances = instances(boxes)
        sample.ignored_instances = instances(crowds)
        samples.append(sample)
    images = [
        torch.randint(0, 256, (3, *size), dtype=torch.uint8) for _ in range(number)
    ]
    return dict(inputs=images, data_samples=samples)


def total_loss(losses):
    """The sum that the detector's train_step would minimise."""
    terms = [value for key, value in losses.items() if 'loss' in key]
    return sum(sum(x) if isinstance(x, list) else x for x in terms)


def write_coco(root: Path, train: int = 4, val: int = 2) -> Path:
    """Write images with one bright square each in COCO's layout.

    Categories are those of COCO, of which the first two occur.
    """
    from mmdet.datasets import CocoDataset

    categories = [
        dict(id=number, name=name)
        for number, name in enumerate(CocoDataset.METAINFO['classes'], start=1)
    ]
    rng = np.random.default_rng(0)
    (root / 'annotations').mkdir(parents=True)
    for split, number in (('train2017', train), ('val2017', val)):
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(1, number + 1):
            pixels = rng.integers(0, 90, (64, 80, 3), np.uint8)
            left, top = (int(x) for x in rng.integers(2, 30, 2))
            width, height = (int(x) for x in rng.integers(16, 32, 2))
            pixels[top : top + height, left : left + width] += 150
            name = f'{i:012d}.jpg'
            Image.fromarray(pixels).save(root / split / name)
            images.append(dict(id=i, file_name=name, width=80, height=64))
            right, bottom = left + width, top + height
            annotations.append(
                dict(
                    id=i,
                    image_id=i,
                    category_id=1 + i % 2,
                    iscrowd=0,
                    bbox=[left, top, width, height],
                    area=width * height,
                    segmentation=[[left, top, right, top, right, bottom, left, bottom]],
                )
            )
        content = dict(images=images, annotations=annotations, categories=categories)
        (root / 'annotations' / f'instances_{split}.json').write_text(
            json.dumps(content)
        )
    return root


_CONFIG = """
_base_ = {base!r}
resize = dict(type='Resize', scale=(96, 64), keep_ratio=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    resize,
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    resize,
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root={root!r}, pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root={root!r}, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={root!r} + '/annotations/instances_val2017.json')
test_evaluator = val_evaluator
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(interval=1, save_best=None)
)
train_cfg = dict(max_epochs=1, val_interval=100)
{more}
"""


def write_config(
    path: Path, data_root: Path, base: str = 'mask_rcnn_vmamba_t_1x.py', more: str = ''
) -> Path:
    """Write a config that shrinks one of ``configs/``, its model included."""
    from mmengine.config import Config

    path.write_text(
        _CONFIG.format(
            base=str(REPO / 'configs' / base), root=str(data_root), more=more
        )
    )
    cfg = shrink(Config.fromfile(path))
    # Whole, so that it can be read from anywhere and without this file.
    cfg.dump(path)
    return path
