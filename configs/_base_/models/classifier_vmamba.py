_base_ = './classifier.py'
model = dict(
    backbone=dict(
        type='mmvssm.VSSM',
        arch='t_s1l8',
        out_indices=(3,),
        # The norm is part of the head.
        out_norm=False,
        drop_path_rate=0.2,
    ),
    head=dict(type='mmvssm.PooledClsHead', in_channels=768),
)
