_base_ = './baseline.py'
ablation = dict(
    order=11,
    row='2 states, ssm_ratio 2.0, 5 blocks',
    paper=dict(
        params='30.8',
        flops='4.98',
        top1='82.50',
        inference_images_per_second='1269',
        training_images_per_second='432',
    ),
)
model = dict(
    backbone=dict(arch=dict(depths=(2, 2, 5, 2), ssm_d_state=2, ssm_ratio=2.0))
)
