# What the trainings of all four families have in common: 300 epochs of AdamW at a batch
# of 1024.
optim_wrapper = dict(
    type='OptimWrapper',
    # The published rate is 5e-4 for 512 images.
    optimizer=dict(
        type='AdamW', lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05
    ),
    # timm's rule: parameters with one axis and biases have no weight decay, nor what
    # the model names. A_log and dt_projs_bias have two axes, so they have it.
    constructor='mmvssm.GroupedOptimWrapperConstructor',
    paramwise_cfg=dict(
        flat_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={
            'pos_embed': dict(decay_mult=0.0),
            'cls_token': dict(decay_mult=0.0),
        },
    ),
)
train_cfg = dict(
    # Can resume within an epoch.
    type='mmvssm.ResumableEpochLoop',
    max_epochs=300,
    val_interval=1,
)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=100),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='mmvssm.SafeCheckpointHook',
        interval=1,
        max_keep_ckpts=3,
        save_best='accuracy/top1',
    ),
    # On SIGTERM or SIGUSR1: save a checkpoint and exit with code 75.
    preemption=dict(type='mmvssm.PreemptionHook'),
    # Stop before a loss that is not finite reaches the weights.
    non_finite=dict(type='mmvssm.NonFiniteLossHook'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='VisualizationHook', enable=False),
)
auto_scale_lr = dict(enable=False, base_batch_size=1024)
