# Vim-T with its class token in the middle, as published. All other rows inherit from
# this one. They are classifiers. `ablation` has the place of a row in the table, and
# the top-1 accuracies of the paper (arXiv 2401.09417, tables 4 and 5) on ImageNet-1K.
_base_ = ['../classification/vim_t_in1k.py']
ablation = dict(
    order=0,
    row='Class token in the middle (Vim-T)',
    paper=dict(params='7', top1='76.1'),
)
