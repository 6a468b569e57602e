_base_ = './baseline.py'
ablation = dict(
    order=3, row='Mean of the patches', paper=dict(_delete_=True, top1='73.9')
)
model = dict(backbone=dict(cls_token='none'))
