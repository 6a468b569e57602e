_base_ = './baseline.py'
ablation = dict(
    order=11,
    row='RoPE for the forget gate',
    paper=dict(params='28', flops='4.5', top1='80.0'),
)
model = dict(backbone=dict(position=('rope',)))
