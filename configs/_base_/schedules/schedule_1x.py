# AdamW and the 1x schedule of the published VMamba (and Swin) detectors. 'norm' is
# matched as a substring: the LayerNorms inside the stem and the downsampling
# layers keep their decay, as published.
max_epochs = 12
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor='mmvssm.GroupedOptimWrapperConstructor',
    paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.0)}),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(
        type='MultiStepLR',
        by_epoch=True,
        begin=0,
        end=max_epochs,
        milestones=[8, 11],
        gamma=0.1,
    ),
]
train_cfg = dict(
    # Can resume within an epoch.
    type='mmvssm.ResumableEpochLoop',
    max_epochs=max_epochs,
    val_interval=1,
)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='mmvssm.SafeCheckpointHook',
        interval=1,
        max_keep_ckpts=2,
        save_best='coco/bbox_mAP',
    ),
    # On SIGTERM or SIGUSR1: save a checkpoint and exit with code 75.
    preemption=dict(type='mmvssm.PreemptionHook'),
    # Stop before a loss that is not finite reaches the weights.
    non_finite=dict(type='mmvssm.NonFiniteLossHook'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='DetVisualizationHook'),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)
