_base_ = './baseline.py'
ablation = dict(
    order=10,
    row='1 state, ssm_ratio 2.0, 5 blocks',
    paper=dict(
        params='30.7',
        flops='4.86',
        top1='82.49',
        inference_images_per_second='1340',
        training_images_per_second='464',
    ),
)
model = dict(backbone=dict(arch=dict(depths=(2, 2, 5, 2), ssm_ratio=2.0)))
