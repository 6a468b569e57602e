_base_ = './baseline.py'
ablation = dict(
    order=10,
    row='CPE for the forget gate',
    paper=dict(params='28', flops='4.5', top1='81.7'),
)
model = dict(backbone=dict(position=('cpe',)))
