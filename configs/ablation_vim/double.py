_base_ = './baseline.py'
ablation = dict(
    order=2, row='Class tokens at both ends', paper=dict(_delete_=True, top1='74.3')
)
model = dict(backbone=dict(cls_token='double'))
