# As in the paper's table 4, without a class token: compare it with mean.py.
_base_ = './mean.py'
ablation = dict(
    order=7,
    row='Mean, every second block backwards',
    paper=dict(_delete_=True, top1='70.9'),
)
model = dict(backbone=dict(directions='alternate'))
