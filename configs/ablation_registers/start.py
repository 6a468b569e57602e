_base_ = './baseline.py'
ablation = dict(order=9, row='All registers at the start', paper=dict(top1='82.1'))
model = dict(backbone=dict(placement='head'))
