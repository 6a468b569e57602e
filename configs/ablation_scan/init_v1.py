_base_ = './baseline.py'
ablation = dict(
    order=8,
    row='Random initialisation',
    paper=dict(params='30.2', flops='4.91', top1='82.58'),
)
model = dict(backbone=dict(arch=dict(ssm_init='v1')))
