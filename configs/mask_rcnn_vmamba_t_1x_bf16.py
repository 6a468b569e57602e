_base_ = './mask_rcnn_vmamba_t_1x.py'
# What `tools/train.py --amp` makes of it.
optim_wrapper = dict(type='mmvssm.Bf16OptimWrapper')
custom_hooks = [dict(type='mmvssm.Float32RegionsHook')]
