_base_ = './baseline.py'
ablation = dict(
    order=1, row='Class token at the start', paper=dict(_delete_=True, top1='75.2')
)
model = dict(backbone=dict(cls_token='head'))
