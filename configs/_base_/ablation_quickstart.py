# For `tools/run_ablation.py --data`: small forms of the rows of configs/ablation or
# configs/ablation_scan. The data set is that of tools/make_quickstart_data.py, at half
# its resolution. A row takes a minute or two on a CPU core.
_base_ = './datasets/quickstart.py'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=(128, 128)),
    dict(type='Resize', scale=(64, 64), keep_ratio=False),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale_factor=0.5, keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(batch_size=8, dataset=dict(pipeline=train_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
# The row whose backbone has this type gets these arguments.
backbones = [
    dict(
        type='mmvssm.LinearAttentionStudy',
        arch='small',
        img_size=64,
        drop_path_rate=0.0,
    ),
    dict(
        type='mmvssm.MLLA',
        arch=dict(_delete_=True, depths=(1, 1, 2, 1), dims=32, num_heads=(2, 4, 8, 16)),
        drop_path_rate=0.0,
    ),
    # Without _delete_: the switches of a row are in its arch.
    dict(
        type='mmvssm.VSSM',
        arch=dict(depths=(1, 1, 2, 1), dims=32),
        drop_path_rate=0.0,
    ),
]
head = dict(
    channels=32, dropout_ratio=0.0, norm_cfg=dict(type='BN', requires_grad=True)
)
model = dict(
    data_preprocessor=dict(size=(64, 64)), decode_head=head, auxiliary_head=head
)

max_iters = 400
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.01, fused=True),
    constructor='mmvssm.GroupedOptimWrapperConstructor',
    paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.0)}),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(
        type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=30, end=max_iters
    ),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters)
# Tested once, at the end.
val_dataloader = val_cfg = val_evaluator = None
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='mmvssm.SafeCheckpointHook', by_epoch=False, interval=100, max_keep_ckpts=1
    ),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)
