_base_ = './baseline.py'
ablation = dict(
    order=18,
    row='GELU in SS2D',
    paper=dict(_delete_=True, params='30.2', flops='4.91', top1='82.53'),
)
model = dict(backbone=dict(arch=dict(ssm_act_layer='gelu')))
