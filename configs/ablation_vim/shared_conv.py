# As in the paper's table 4, without a class token: compare it with mean.py.
_base_ = './mean.py'
ablation = dict(
    order=8,
    row='Mean, both directions with one convolution',
    paper=dict(_delete_=True, top1='72.8'),
)
model = dict(backbone=dict(directions='shared_conv'))
