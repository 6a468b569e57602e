# MLLA's. All rates are those of a batch of 4096, eight times the published ones of 512.
_base_ = './schedule_imagenet.py'
optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='float16',
    loss_scale='dynamic',
    optimizer=dict(lr=4e-3),
    clip_grad=dict(max_norm=5.0),
)
# By iteration. The cosine spans the whole training, and the warm-up hides its begin.
param_scheduler = dict(
    type='mmvssm.TimmCosineLR',
    warmup=20,
    warmup_lr=4e-6,
    eta_min=4e-5,
    by_epoch=True,
    convert_to_iter_based=True,
)
# 0.9996 at a batch of 4096, 0.9999 at 1024. It is what MESA learns from. Which weights
# the published figures belong to is not stated; the published code validates both.
custom_hooks = [
    dict(type='mmvssm.TimmEMAHook', decay=0.9996, base_batch_size=4096),
]
# The batch norms of all processes have the statistics of the first.
model_wrapper_cfg = dict(type='MMDistributedDataParallel', broadcast_buffers=True)
auto_scale_lr = dict(base_batch_size=4096)
