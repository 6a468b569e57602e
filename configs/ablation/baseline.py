# Swin-T with linear attention in the place of window attention. Every other row
# inherits this one and sets its switches. `ablation` says where a row stands in
# the table, and what the paper (arXiv 2405.16605, tables 1 to 3) has for it:
# millions of parameters, GFLOPs and top-1 accuracy on ImageNet-1K.
_base_ = [
    '../_base_/models/upernet_linear_attention.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/schedule_160k.py',
    '../_base_/default_runtime.py',
]
ablation = dict(
    order=0, row='Baseline', paper=dict(params='28', flops='4.5', top1='77.6')
)
