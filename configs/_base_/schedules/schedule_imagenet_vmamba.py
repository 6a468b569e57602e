# VMamba's. All rates are those of a batch of 1024, twice the published ones of 512.
_base_ = './schedule_imagenet.py'
optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='float16',
    loss_scale='dynamic',
    clip_grad=dict(max_norm=5.0),
)
# By iteration. The cosine begins after the warm-up.
param_scheduler = dict(
    type='mmvssm.TimmCosineLR',
    warmup=20,
    warmup_lr=1e-6,
    eta_min=1e-5,
    warmup_prefix=True,
    by_epoch=True,
    convert_to_iter_based=True,
)
# The published figures are those of the average. The published code validates the raw
# weights, too, and both in float16; here the average alone, in float32.
custom_hooks = [dict(type='mmvssm.TimmEMAHook', decay=0.9999)]
