_base_ = './baseline.py'
ablation = dict(order=10, row='All registers in the middle', paper=dict(top1='82.6'))
model = dict(backbone=dict(placement='middle'))
