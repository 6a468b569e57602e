_base_ = './baseline.py'
ablation = dict(
    order=4,
    row='Cross-Scan, no DWConv',
    paper=dict(
        params='30.2',
        flops='4.89',
        top1='82.25',
        inference_images_per_second='1717',
        training_images_per_second='577',
    ),
)
model = dict(backbone=dict(arch=dict(ssm_conv=-1)))
