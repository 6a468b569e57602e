_base_ = './upernet_vmamba.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmvssm.MLLA',
        arch='t',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
