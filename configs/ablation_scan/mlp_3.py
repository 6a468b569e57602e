_base_ = './baseline.py'
ablation = dict(
    order=16,
    row='mlp_ratio 3, ssm_ratio 1.5',
    paper=dict(params='28.5', flops='4.65', top1='82.75'),
)
model = dict(backbone=dict(arch=dict(mlp_ratio=3.0, ssm_ratio=1.5)))
