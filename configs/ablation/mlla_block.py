_base_ = './baseline.py'
ablation = dict(order=12, row='MLLA block on this macro architecture', paper=None)
model = dict(backbone=dict(design='sub', position=('cpe', 'lepe', 'rope')))
