_base_ = './upernet.py'
model = dict(
    backbone=dict(
        type='mmvssm.Vim',
        arch='t',
        img_size=512,
        out_indices=(5, 11, 17, 23),
        drop_path_rate=0.1,
    ),
    neck=dict(
        type='mmvssm.Feature2Pyramid', embed_dim=192, norm_cfg={{_base_.norm_cfg}}
    ),
    decode_head=dict(in_channels=[192, 192, 192, 192], channels=192),
    auxiliary_head=dict(in_channels=192),
    # Windows of the size for which positions are learned.
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)),
)
