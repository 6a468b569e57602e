# A VMamba Mask R-CNN small enough to train in minutes on two CPU cores, on the data
# set that tools/make_quickstart_data.py makes in COCO's layout. `make
# quickstart-det` runs it.
_base_ = [
    './_base_/models/mask_rcnn_vmamba.py',
    './_base_/datasets/quickstart_coco.py',
    './_base_/default_runtime_det.py',
]
num_classes = 7
channels = 64
strides = [4, 8, 16, 32]
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, dims=32, depths=(1, 1, 3, 1)), drop_path_rate=0.0
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=channels, num_outs=4),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        # 16 to 128 pixels.
        anchor_generator=dict(scales=[4], strides=strides),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels, featmap_strides=strides),
        bbox_head=dict(
            in_channels=channels, fc_out_channels=256, num_classes=num_classes
        ),
        mask_roi_extractor=dict(out_channels=channels, featmap_strides=strides),
        mask_head=dict(
            num_convs=2,
            in_channels=channels,
            conv_out_channels=channels,
            num_classes=num_classes,
        ),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100)),
)

max_iters = 2000
# tools/quickstart.py takes the most iterations that this machine does in this time.
schedules = [2000, 1400, 1000]
training_seconds = 720
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.01, fused=True),
    constructor='mmvssm.GroupedOptimWrapperConstructor',
    paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.0)}),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=100, end=max_iters
    ),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=500)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
log_processor = dict(by_epoch=False)
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
    visualization=dict(type='DetVisualizationHook'),
)
