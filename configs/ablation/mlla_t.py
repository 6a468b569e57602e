# MLLA-T, with a macro architecture of its own. The paper trains it with one more
# strategy against overfitting (MESA); without it, it has 83.3.
_base_ = './baseline.py'
ablation = dict(
    order=13, row='MLLA-T', paper=dict(params='25', flops='4.2', top1='83.5')
)
channels = [64, 128, 256, 512]
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmvssm.MLLA',
        arch='t',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
    ),
    decode_head=dict(in_channels=channels),
    auxiliary_head=dict(in_channels=channels[2]),
)
