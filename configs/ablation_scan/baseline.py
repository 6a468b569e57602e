# VMamba-T (t_s1l8) with the scan order 'cross'. All other rows inherit from this one
# and set their switches. `ablation` has the place of a row in the table, and the
# figures of the paper (arXiv 2401.10166, tables 10 to 15): millions of parameters,
# GFLOPs, top-1 accuracy on ImageNet-1K and images a second on an A100.
_base_ = [
    '../_base_/models/upernet_vmamba.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/schedule_160k.py',
    '../_base_/default_runtime.py',
]
ablation = dict(
    order=0,
    row='Cross-Scan (VMamba-T)',
    paper=dict(
        params='30.2',
        flops='4.91',
        top1='82.60',
        inference_images_per_second='1686',
        training_images_per_second='571',
    ),
)
model = dict(
    backbone=dict(arch=dict(_delete_=True, depths=(2, 2, 8, 2), dims=96)),
)
