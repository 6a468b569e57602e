_base_ = './baseline.py'
ablation = dict(order=21, row='Zigzag', paper=None)
model = dict(backbone=dict(orders='zigzag'))
