_base_ = './baseline.py'
ablation = dict(
    order=2,
    row='Bidi-Scan',
    paper=dict(
        params='30.2',
        flops='4.91',
        top1='82.49',
        inference_images_per_second='1687',
        training_images_per_second='572',
    ),
)
model = dict(backbone=dict(arch=dict(forward_type='v052d_noz')))
