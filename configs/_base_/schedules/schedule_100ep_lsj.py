# The schedule of ViTDet and the published Vim detectors: 184375 iterations of 64 images
# are 100 epochs. The published trainings use float16 with a dynamic loss scale;
# `tools/train.py --amp float16` does the same. bfloat16 needs no scale. In the
# published trainings the weights of RMSNorm, A and the biases have weight decay, too.
max_iters = 184375
optim_wrapper = dict(
    type='mmvssm.Bf16OptimWrapper',
    constructor='mmvssm.LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
    paramwise_cfg=dict(layer_decay_rate=0.837),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(
        type='MultiStepLR',
        by_epoch=False,
        begin=0,
        end=max_iters,
        # After 8/9 and 26/27 of the iterations.
        milestones=[163889, 177546],
        gamma=0.1,
    ),
]
custom_hooks = [dict(type='mmvssm.Float32RegionsHook')]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=10000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='mmvssm.SafeCheckpointHook',
        by_epoch=False,
        interval=10000,
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
auto_scale_lr = dict(enable=False, base_batch_size=64)
