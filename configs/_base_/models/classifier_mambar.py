_base_ = './classifier.py'
model = dict(
    # No erasing in any stage.
    data_preprocessor=dict(erase=0.0),
    backbone=dict(type='mmvssm.MambaR', arch='b', img_size=224, classification=True),
    head=dict(
        type='mmvssm.RegisterClsHead', in_channels=768, num_registers=12, reduce=4
    ),
)
