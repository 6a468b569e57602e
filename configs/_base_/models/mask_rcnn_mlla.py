_base_ = './mask_rcnn_vmamba.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmvssm.MLLA',
        arch='t',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
