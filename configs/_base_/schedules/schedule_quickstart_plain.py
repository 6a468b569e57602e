# The grid of an isotropic backbone never shrinks, so its blocks take longer. So there
# are fewer iterations. These models also need a smaller learning rate.
_base_ = './schedule_quickstart.py'
max_iters = 1200
schedules = [1200, 800]
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(
        type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=30, end=max_iters
    ),
]
train_cfg = dict(max_iters=max_iters, val_interval=400)
