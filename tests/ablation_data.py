"""A data config for the ablation, small enough to train on in a test."""

from pathlib import Path

from tiny import write_ade

_DATA = """
data_root = {root!r}
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=(64, 64), keep_ratio=False),
    dict(type='PackSegInputs')]
test_pipeline = [pipeline[0], pipeline[2], pipeline[1], pipeline[3]]
train_dataloader = dict(
    batch_size=2, num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='BaseSegDataset', data_root=data_root, pipeline=pipeline,
        reduce_zero_label=True, metainfo=dict(classes=('a', 'b', 'c')),
        data_prefix=dict(
            img_path='images/training', seg_map_path='annotations/training')))
test_dataloader = dict(
    batch_size=1, num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset', data_root=data_root, pipeline=test_pipeline,
        reduce_zero_label=True, metainfo=dict(classes=('a', 'b', 'c')),
        data_prefix=dict(
            img_path='images/validation', seg_map_path='annotations/validation')))
val_dataloader = test_dataloader
test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
val_evaluator = test_evaluator
backbones = [
    dict(type='mmvssm.VSSM', arch='no such thing'),
    dict(
        type='mmvssm.LinearAttentionStudy', img_size=64,
        arch=dict(_delete_=True, depths=(1, 1, 1, 1), dims=8, head_dim=4))]
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(type='mmvssm.VSSM', arch='t_s1l8'),
    decode_head=dict(channels=8, norm_cfg=norm_cfg),
    auxiliary_head=dict(channels=8, norm_cfg=norm_cfg))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=9)
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='mmvssm.SafeCheckpointHook', by_epoch=False, interval=1),
    sampler_seed=dict(type='DistSamplerSeedHook'))
env_cfg = dict(cudnn_benchmark=False)
"""


def write_data_config(folder: Path) -> Path:
    """Write images, labels and the config."""
    write_ade(folder / 'ade')
    path = folder / 'data.py'
    path.write_text(_DATA.format(root=str(folder / 'ade')))
    return path
