_base_ = './baseline.py'
ablation = dict(
    order=9,
    row='LePE for the forget gate',
    paper=dict(params='28', flops='4.5', top1='81.6'),
)
model = dict(backbone=dict(position=('lepe',)))
