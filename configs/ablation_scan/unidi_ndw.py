_base_ = './baseline.py'
ablation = dict(
    order=5,
    row='Unidi-Scan, no DWConv',
    paper=dict(
        params='30.2',
        flops='4.89',
        top1='80.88',
        inference_images_per_second='1716',
        training_images_per_second='578',
    ),
)
model = dict(backbone=dict(arch=dict(forward_type='v051d_noz', ssm_conv=-1)))
