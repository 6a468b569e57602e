_base_ = './upernet.py'
model = dict(
    backbone=dict(
        type='mmvssm.MambaR',
        arch='s',
        img_size=512,
        out_indices=(5, 11, 17, 23),
        feature='residual',
        last_layer_process='add',
    ),
    # Without parameters: so the numbers of parameters are those of the paper.
    neck=dict(type='mmvssm.PlainPyramid', channels=384, learned=False),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
    # Windows of the size for which positions are learned.
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)),
)
