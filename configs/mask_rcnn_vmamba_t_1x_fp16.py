_base_ = './mask_rcnn_vmamba_t_1x.py'
# The same as with `tools/train.py --amp float16`; needs a GPU.
optim_wrapper = dict(type='AmpOptimWrapper', dtype='float16', loss_scale='dynamic')
custom_hooks = [dict(type='mmvssm.Float32RegionsHook')]
