_base_ = './baseline.py'
ablation = dict(
    order=8,
    row='Random initialisation',
    paper=dict(
        _delete_=True,
        params='30.2',
        flops='4.91',
        top1='82.58',
        inference_images_per_second='1682',
    ),
)
model = dict(backbone=dict(arch=dict(ssm_init='v1')))
