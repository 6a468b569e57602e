_base_ = './baseline.py'
ablation = dict(
    order=15,
    row='1 state, ssm_ratio 1.0, 5 blocks',
    paper=dict(
        params='25.6',
        flops='3.98',
        top1='81.87',
        inference_images_per_second='1942',
        training_images_per_second='647',
    ),
)
model = dict(backbone=dict(arch=dict(depths=(2, 2, 5, 2))))
