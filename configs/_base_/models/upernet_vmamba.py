_base_ = './upernet.py'
model = dict(
    backbone=dict(
        type='mmvssm.VSSM', arch='t_s1l8', out_indices=(0, 1, 2, 3), drop_path_rate=0.2
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
