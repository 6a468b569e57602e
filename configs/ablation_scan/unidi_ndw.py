_base_ = './baseline.py'
ablation = dict(
    order=5,
    row='Unidi-Scan, no DWConv',
    paper=dict(params='30.2', flops='4.89', top1='80.88'),
)
model = dict(backbone=dict(arch=dict(forward_type='v051d_noz', ssm_conv=-1)))
