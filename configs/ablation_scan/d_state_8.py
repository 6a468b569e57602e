_base_ = './baseline.py'
ablation = dict(
    order=13,
    row='8 states, ssm_ratio 1.5, 5 blocks',
    paper=dict(
        params='28.6',
        flops='5.04',
        top1='82.69',
        inference_images_per_second='1148',
        training_images_per_second='365',
    ),
)
model = dict(
    backbone=dict(arch=dict(depths=(2, 2, 5, 2), ssm_d_state=8, ssm_ratio=1.5))
)
