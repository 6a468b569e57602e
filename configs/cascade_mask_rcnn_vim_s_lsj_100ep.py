_base_ = './cascade_mask_rcnn_vim_t_lsj_100ep.py'
model = dict(
    backbone=dict(
        arch='s', init_cfg=dict(type='Pretrained', checkpoint='mmvssm://vim_s')
    ),
    neck=dict(in_channels=384),
)
