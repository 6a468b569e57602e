_base_ = './baseline.py'
ablation = dict(order=24, row='Diagonals', paper=None)
model = dict(backbone=dict(orders='diagonals'))
