_base_ = './baseline.py'
ablation = dict(order=22, row='Windows of 2x2', paper=None)
model = dict(backbone=dict(orders='windows2'))
