_base_ = './baseline.py'
ablation = dict(
    order=7,
    row='+ Block design, sub',
    paper=dict(params='31', flops='4.8', top1='80.9'),
)
model = dict(backbone=dict(design='sub'))
