_base_ = './upernet_vmamba_t.py'
# The published batch of 16 on one GPU: the gradients of 8 batches of 2 images are added
# up for one step. Each of these batches is an iteration, so there are 8 times as many
# iterations. Norms in the heads see 2 images, not 16 (SyncBN is BN in one process).
count = 8
optim_wrapper = dict(accumulative_counts=count)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500 * count),
    dict(
        type='PolyLR',
        eta_min=0.0,
        power=1.0,
        begin=1500 * count,
        end=160000 * count,
        by_epoch=False,
    ),
]
train_cfg = dict(max_iters=160000 * count, val_interval=16000 * count)
default_hooks = dict(
    logger=dict(interval=50 * count), checkpoint=dict(interval=16000 * count)
)
