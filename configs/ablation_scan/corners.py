_base_ = './baseline.py'
ablation = dict(order=20, row='Corners', paper=None)
model = dict(backbone=dict(orders='corners'))
