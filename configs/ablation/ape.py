_base_ = './baseline.py'
ablation = dict(
    order=8,
    row='APE for the forget gate',
    paper=dict(params='30', flops='4.5', top1='80.0'),
)
model = dict(backbone=dict(position=('ape',)))
