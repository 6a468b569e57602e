_base_ = './baseline.py'
ablation = dict(
    order=12,
    row='4 states, ssm_ratio 2.0, 5 blocks',
    paper=dict(
        params='31.0',
        flops='5.22',
        top1='82.51',
        inference_images_per_second='1147',
        training_images_per_second='382',
    ),
)
model = dict(
    backbone=dict(arch=dict(depths=(2, 2, 5, 2), ssm_d_state=4, ssm_ratio=2.0))
)
