_base_ = './baseline.py'
ablation = dict(
    order=4, row='Maximum over the patches', paper=dict(_delete_=True, top1='73.4')
)
model = dict(backbone=dict(cls_token='none'), head=dict(pooling='max'))
