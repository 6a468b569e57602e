_base_ = './baseline.py'
ablation = dict(
    order=7,
    row='Cascade-Scan, no DWConv',
    paper=dict(
        params='30.2',
        flops='4.89',
        top1='81.71',
        inference_images_per_second='1007',
        training_images_per_second='309',
    ),
)
model = dict(backbone=dict(arch=dict(forward_type='v052dc_noz', ssm_conv=-1)))
