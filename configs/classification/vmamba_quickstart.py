# A VMamba classifier small enough to train in minutes on two CPU cores, on the class
# folders that `tools/make_quickstart_data.py --classification` makes. `make
# quickstart-cls` runs it. The backbone is that of ../upernet_vmamba_quickstart.py,
# which starts from the checkpoint: tools/quickstart.py --pretrained CHECKPOINT.
_base_ = [
    '../_base_/datasets/quickstart_cls.py',
    '../_base_/default_runtime_cls.py',
]
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmvssm.VSSM',
        arch=dict(dims=32, depths=(1, 1, 3, 1)),
        out_indices=(3,),
        # The norm belongs to the head.
        out_norm=False,
        drop_path_rate=0.0,
    ),
    head=dict(
        type='mmvssm.PooledClsHead',
        in_channels=256,
        num_classes=7,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)

max_iters = 1500
# tools/quickstart.py takes the most iterations that this machine does in this time.
schedules = [1500, 1200, 900]
training_seconds = 240
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, weight_decay=0.05, fused=True),
    constructor='mmvssm.GroupedOptimWrapperConstructor',
    paramwise_cfg=dict(norm_decay_mult=0.0, flat_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=60),
    dict(
        type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=60, end=max_iters
    ),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=500)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='mmvssm.SafeCheckpointHook', by_epoch=False, interval=300, max_keep_ckpts=1
    ),
    # On SIGTERM or SIGUSR1: save a checkpoint and exit with code 75.
    preemption=dict(type='mmvssm.PreemptionHook'),
    # Stop before a loss that is not finite reaches the weights.
    non_finite=dict(type='mmvssm.NonFiniteLossHook'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='VisualizationHook', enable=False),
)
