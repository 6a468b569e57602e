"""Classifiers of MMPretrain small enough to train in a test, one of each family."""

from pathlib import Path

import numpy as np
from PIL import Image

from tiny import REPO

PLAIN = dict(embed_dims=16, depth=2, patch_size=4, stride=4, d_state=4)
# Family -> backbone and head of a config.
PARTS = {
    'vmamba': (
        dict(
            type='mmvssm.VSSM',
            arch=dict(depths=(1, 1), dims=8),
            out_indices=(1,),
            out_norm=False,
            drop_path_rate=0.0,
        ),
        dict(type='mmvssm.PooledClsHead', in_channels=16),
    ),
    'vim': (
        dict(
            type='mmvssm.Vim',
            arch=PLAIN,
            img_size=32,
            classification=True,
            cls_token='middle',
            drop_path_rate=0.0,
        ),
        dict(type='mmvssm.ClassTokenClsHead', in_channels=16),
    ),
    'mambar': (
        dict(
            type='mmvssm.MambaR',
            arch=dict(PLAIN, registers=3),
            img_size=32,
            classification=True,
            drop_path_rate=0.0,
        ),
        dict(type='mmvssm.RegisterClsHead', in_channels=16, num_registers=3, reduce=2),
    ),
    'mlla': (
        dict(
            type='mmvssm.MLLA',
            arch=dict(depths=(1, 1), dims=16, num_heads=(2, 4)),
            out_indices=(1,),
            out_norm=False,
            drop_path_rate=0.0,
        ),
        dict(type='mmvssm.PooledClsHead', in_channels=32),
    ),
}


def model_config(family='vmamba', num_classes=3, **more):
    """Config of an ``ImageClassifier``; ``more`` goes into the head."""
    backbone, head = PARTS[family]
    return dict(
        type='mmpretrain.ImageClassifier',
        data_preprocessor=dict(
            num_classes=num_classes, mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True
        ),
        backbone=dict(backbone),
        head=dict(head, num_classes=num_classes, **more),
    )


def build(family='vmamba', num_classes=3, **more):
    """Build it, as a runner under the scope of MMPretrain would."""
    from mmengine.registry import DefaultScope
    from mmpretrain.registry import MODELS

    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(model_config(family, num_classes, **more))


CLASSES = ('blob', 'cross', 'stripe')
_CONFIG = """
_base_ = {base!r}
model = {model!r}
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=32),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=36, edge='short'),
    dict(type='CenterCrop', crop_size=32),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='CustomDataset', data_root={root!r}, data_prefix='train',
                 pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root={root!r}, data_prefix='val',
                 pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, 2))
test_evaluator = val_evaluator
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05))
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
val_cfg = dict()
test_cfg = dict()
log_processor = dict(by_epoch=True)
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=1),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='mmvssm.SafeCheckpointHook', interval=1),
    preemption=dict(type='mmvssm.PreemptionHook'),
    non_finite=dict(type='mmvssm.NonFiniteLossHook'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='VisualizationHook', enable=False))
env_cfg = dict(cudnn_benchmark=False)
{more}
"""


def write_folders(root, classes=CLASSES, train=4, val=2, seed=0):
    """Folders of small images, one a class: ``root/train/NAME/0.png`` ..."""
    rng = np.random.default_rng(seed)
    for split, number in (('train', train), ('val', val)):
        for name in classes:
            folder = Path(root, split, name)
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (40, 36 + 4 * i, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f'{i}.png')
    return Path(root)


def write_config(path, root, more='', family='vmamba', **options):
    """Write a config that trains a tiny classifier on such folders."""
    text = _CONFIG.format(
        base=str(REPO / 'configs/_base_/default_runtime_cls.py'),
        model=model_config(family, **options),
        root=str(root),
        more=more,
    )
    path.write_text(text)
    return path
