_base_ = './baseline.py'
ablation = dict(
    order=6,
    row='Bidi-Scan, no DWConv',
    paper=dict(
        params='30.2',
        flops='4.89',
        top1='81.80',
        inference_images_per_second='1719',
        training_images_per_second='578',
    ),
)
model = dict(backbone=dict(arch=dict(forward_type='v052d_noz', ssm_conv=-1)))
