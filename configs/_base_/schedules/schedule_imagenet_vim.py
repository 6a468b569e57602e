# Vim's, in float32 and without clipping. The first and the last rate are not scaled by
# the batch.
_base_ = './schedule_imagenet.py'
# By epoch. The cosine spans all epochs, and the warm-up hides its begin.
param_scheduler = dict(
    type='mmvssm.TimmCosineLR', warmup=5, warmup_lr=1e-6, eta_min=1e-5, by_epoch=True
)
# The averages are kept, but the raw weights are validated and published.
custom_hooks = [dict(type='mmvssm.TimmEMAHook', decay=0.99996, evaluate='raw')]
