_base_ = './baseline.py'
ablation = dict(
    order=1,
    row='Unidi-Scan',
    paper=dict(
        params='30.2',
        flops='4.91',
        top1='82.26',
        inference_images_per_second='1682',
        training_images_per_second='571',
    ),
)
model = dict(backbone=dict(arch=dict(forward_type='v051d_noz')))
