_base_ = './baseline.py'
ablation = dict(
    order=9, row='All registers in the middle', paper=dict(_delete_=True, top1='82.6')
)
model = dict(backbone=dict(placement='middle'))
