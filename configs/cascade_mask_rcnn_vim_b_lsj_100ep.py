_base_ = './cascade_mask_rcnn_vim_t_lsj_100ep.py'
model = dict(
    backbone=dict(
        arch='b', init_cfg=dict(type='Pretrained', checkpoint='mmvssm://vim_b')
    ),
    neck=dict(in_channels=768),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.7))
