_base_ = './baseline.py'
ablation = dict(
    order=16,
    row='mlp_ratio 3, ssm_ratio 1.5',
    paper=dict(
        params='28.5',
        flops='4.65',
        top1='82.75',
        inference_images_per_second='1419',
        training_images_per_second='473',
    ),
)
model = dict(backbone=dict(arch=dict(mlp_ratio=3.0, ssm_ratio=1.5)))
