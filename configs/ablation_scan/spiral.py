_base_ = './baseline.py'
ablation = dict(order=26, row='Spiral', paper=None)
model = dict(backbone=dict(orders='spiral'))
