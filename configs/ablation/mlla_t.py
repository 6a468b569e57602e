# MLLA-T, with a macro architecture of its own. The paper trains it with one more
# strategy against overfitting (MESA); without it, it has 83.3.
_base_ = '../upernet_mlla_t.py'
# All rows start from random weights.
model = dict(backbone=dict(init_cfg=None))
ablation = dict(
    order=13, row='MLLA-T', paper=dict(params='25', flops='4.2', top1='83.5')
)
