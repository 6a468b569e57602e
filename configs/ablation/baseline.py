# Swin-T with linear attention instead of window attention. All other rows inherit from
# this one and set their switches. `ablation` has the place of a row in the table, and
# the figures of the paper (arXiv 2405.16605, tables 1 to 3): millions of parameters,
# GFLOPs and top-1 accuracy on ImageNet-1K.
_base_ = [
    '../_base_/models/upernet_linear_attention.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/schedule_160k.py',
    '../_base_/default_runtime.py',
]
ablation = dict(
    order=0, row='Baseline', paper=dict(params='28', flops='4.5', top1='77.6')
)
