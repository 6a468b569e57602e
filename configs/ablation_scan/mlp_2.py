_base_ = './baseline.py'
ablation = dict(
    order=17,
    row='mlp_ratio 2, ssm_ratio 2.5',
    paper=dict(
        params='29.9',
        flops='4.95',
        top1='82.86',
        inference_images_per_second='1075',
        training_images_per_second='361',
    ),
)
model = dict(backbone=dict(arch=dict(mlp_ratio=2.0, ssm_ratio=2.5)))
