_base_ = './baseline.py'
ablation = dict(
    order=3,
    row='Cascade-Scan',
    paper=dict(
        params='30.2',
        flops='4.91',
        top1='82.42',
        inference_images_per_second='998',
        training_images_per_second='308',
    ),
)
model = dict(backbone=dict(arch=dict(forward_type='v052dc_noz')))
