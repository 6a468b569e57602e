_base_ = './baseline.py'
ablation = dict(
    order=8, row='All registers at the start', paper=dict(_delete_=True, top1='82.1')
)
model = dict(backbone=dict(placement='head'))
