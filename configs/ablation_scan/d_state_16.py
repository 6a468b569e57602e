_base_ = './baseline.py'
ablation = dict(
    order=14,
    row='16 states, ssm_ratio 1.0, 5 blocks',
    paper=dict(
        params='26.3',
        flops='4.87',
        top1='82.31',
        inference_images_per_second='1164',
        training_images_per_second='358',
    ),
)
model = dict(backbone=dict(arch=dict(depths=(2, 2, 5, 2), ssm_d_state=16)))
