# AdamW with layer decay, linear warm-up and linear decay: the schedule of the
# published Vim UperNets. Their code lowers the rate of the stem only, because it looks
# for the blocks under a wrong name. published_vim_grouping=True does the same.
_base_ = './schedule_160k_layer_decay.py'
max_iters = 60000
optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(layer_decay_rate=0.92, published_vim_grouping=False),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(
        type='PolyLR', eta_min=0.0, power=1.0, begin=1500, end=max_iters, by_epoch=False
    ),
]
train_cfg = dict(max_iters=max_iters, val_interval=6000)
default_hooks = dict(checkpoint=dict(interval=6000))
auto_scale_lr = dict(base_batch_size=32)
