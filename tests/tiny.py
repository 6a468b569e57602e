"""A data set and configs small enough to train on in a test."""

from pathlib import Path

import numpy as np
from PIL import Image

from mmvssm.backbones.vssm import ARCH_ZOO

REPO = Path(__file__).parents[1]

_CONFIG = """
_base_ = {base!r}
norm_cfg = dict({norm})
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(
        arch=dict(_delete_=True, depths=(1, 1, 1, 1), dims=8),
        drop_path_rate=0., init_cfg=dict(_delete_=True)),
    decode_head=dict(
        in_channels=[8, 16, 32, 64], channels=16, dropout_ratio=0.,
        norm_cfg=norm_cfg),
    auxiliary_head=dict(
        in_channels=32, channels=8, dropout_ratio=0., norm_cfg=norm_cfg))
resize = dict(type='Resize', scale=(64, 64), keep_ratio=False)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    resize,
    dict(type='PackSegInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    resize,
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [resize],
            [
                dict(type='RandomFlip', prob=0., direction='horizontal'),
                dict(type='RandomFlip', prob=1., direction='horizontal')
            ],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ])
]
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False,
    dataset=dict(data_root={root!r}, pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(data_root={root!r}, pipeline=test_pipeline))
test_dataloader = val_dataloader
default_hooks = dict(
    logger=dict(interval=1),
    checkpoint=dict(interval=100, save_best=None, save_last=True))
env_cfg = dict(cudnn_benchmark=False)
train_cfg = dict(max_iters=2, val_interval=100)
{more}
"""


def write_config(
    path: Path,
    data_root: Path,
    more: str = '',
    norm: str = "type='SyncBN', requires_grad=True",
    base: str = 'upernet_vmamba_t.py',
) -> Path:
    """Write a config that shrinks one of ``configs/``."""
    path.write_text(
        _CONFIG.format(
            base=str(REPO / 'configs' / base), root=str(data_root), norm=norm, more=more
        )
    )
    return path


def write_ade(root: Path, train: int = 4, val: int = 2) -> Path:
    """Write random images and labels in ADE20K's layout."""
    rng = np.random.default_rng(0)
    for split, number in (('training', train), ('validation', val)):
        images = root / 'images' / split
        labels = root / 'annotations' / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for i in range(number):
            pixels = rng.integers(0, 256, (64, 80, 3), np.uint8)
            Image.fromarray(pixels).save(images / f'{i}.jpg')
            # 0 is what reduce_zero_label turns into the ignored label.
            classes = rng.integers(0, 4, (8, 10), np.uint8).repeat(8, 0)
            Image.fromarray(classes.repeat(8, 1)).save(labels / f'{i}.png')
    return root


def shrink(cfg):
    """Make a segmentor of one block a map, and an eighth or less of the channels.

    The quickstarts are small as they are.
    """
    model = cfg.model
    model.data_preprocessor.size = (64, 96)
    # No file fits it.
    model.backbone.init_cfg = None
    if not isinstance(model.backbone.arch, str):
        return cfg
    if model.backbone.type == 'mmvssm.VSSM':
        arch = ARCH_ZOO[model.backbone.arch]
        model.backbone.arch = dict(arch, depths=(1, 1, 1, 1), dims=8)
        channels = [8 * 2**i for i in model.backbone.out_indices]
    elif model.backbone.type == 'mmvssm.MLLA':
        model.backbone.arch = dict(depths=(1, 1, 1, 1), dims=8, num_heads=(1, 2, 2, 4))
        channels = [8 * 2**i for i in model.backbone.out_indices]
    else:
        model.backbone.arch = dict(embed_dims=16, depth=4)
        model.backbone.out_indices = (0, 1, 2, 3)
        model.neck['embed_dim' if 'embed_dim' in model.neck else 'channels'] = 16
        channels = [16] * 4
    model.decode_head.update(in_channels=channels, channels=16)
    if model.get('auxiliary_head'):
        model.auxiliary_head.update(
            in_channels=channels[model.auxiliary_head.in_index], channels=8
        )
    return cfg
