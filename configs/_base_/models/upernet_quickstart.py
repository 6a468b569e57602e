# Heads small enough to train in minutes on two CPU cores.
_base_ = './upernet.py'
num_classes = 8
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    decode_head=dict(
        channels=48, dropout_ratio=0.0, num_classes=num_classes, norm_cfg=norm_cfg
    ),
    auxiliary_head=dict(
        channels=32, dropout_ratio=0.0, num_classes=num_classes, norm_cfg=norm_cfg
    ),
)
