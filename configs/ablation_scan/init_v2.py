_base_ = './baseline.py'
ablation = dict(
    order=9,
    row='Zero initialisation',
    paper=dict(
        _delete_=True,
        params='30.2',
        flops='4.91',
        top1='82.67',
        inference_images_per_second='1683',
    ),
)
model = dict(backbone=dict(arch=dict(ssm_init='v2')))
