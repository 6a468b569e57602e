_base_ = './classifier.py'
model = dict(
    backbone=dict(
        type='mmvssm.Vim',
        arch='t',
        classification=True,
        cls_token='middle',
        drop_path_rate=0.0,
    ),
    head=dict(type='mmvssm.ClassTokenClsHead', in_channels=192),
)
