_base_ = './schedule_160k.py'
max_iters = 2800
# tools/quickstart.py takes the most iterations that this machine does in this time.
schedules = [2800, 2200, 1600]
training_seconds = 360
optim_wrapper = dict(
    optimizer=dict(lr=5e-3, fused=True),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(
        type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=30, end=max_iters
    ),
]
train_cfg = dict(max_iters=max_iters, val_interval=1400)
default_hooks = dict(
    checkpoint=dict(
        _delete_=True,
        type='mmvssm.SafeCheckpointHook',
        by_epoch=False,
        interval=300,
        max_keep_ckpts=1,
    )
)
auto_scale_lr = dict(base_batch_size=4)
