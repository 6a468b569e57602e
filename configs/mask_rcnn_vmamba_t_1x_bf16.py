_base_ = './mask_rcnn_vmamba_t_1x.py'
# The same as with `tools/train.py --amp`.
optim_wrapper = dict(type='mmvssm.Bf16OptimWrapper')
custom_hooks = [dict(type='mmvssm.Float32RegionsHook')]
