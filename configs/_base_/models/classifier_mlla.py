_base_ = './classifier.py'
model = dict(
    # From epoch 75 on, a quarter of 300, it learns from its averaged weights, too.
    type='mmvssm.MESAClassifier',
    ratio=1.0,
    begin=75,
    backbone=dict(
        type='mmvssm.MLLA',
        arch='t',
        out_indices=(3,),
        # The norm is part of the head.
        out_norm=False,
        drop_path_rate=0.2,
    ),
    head=dict(type='mmvssm.PooledClsHead', in_channels=512),
)
