_base_ = './baseline.py'
ablation = dict(order=25, row='Hilbert curve', paper=None)
model = dict(backbone=dict(orders='hilbert'))
