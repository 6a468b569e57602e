_base_ = './baseline.py'
ablation = dict(
    order=19,
    row='ReLU in SS2D',
    paper=dict(_delete_=True, params='30.2', flops='4.91', top1='82.65'),
)
model = dict(backbone=dict(arch=dict(ssm_act_layer='relu')))
