# MLLA-T, which has another macro architecture. The paper trains it with a further
# method against overfitting (MESA); without that method it reaches 83.3.
_base_ = '../upernet_mlla_t.py'
# All rows start from random weights.
model = dict(backbone=dict(init_cfg=None))
ablation = dict(
    order=13, row='MLLA-T', paper=dict(params='25', flops='4.2', top1='83.5')
)
