_base_ = './baseline.py'
ablation = dict(order=23, row='Windows of 7x7', paper=None)
model = dict(backbone=dict(orders='windows7'))
