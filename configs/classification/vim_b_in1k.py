_base_ = [
    '../_base_/models/classifier_vim.py',
    '../_base_/datasets/imagenet_repeated.py',
    '../_base_/schedules/schedule_imagenet_vim.py',
    '../_base_/default_runtime_imagenet.py',
]
# No script was published. The paper has a batch of 1024, a rate of 1e-3, a weight decay
# of 0.05, 300 epochs and averages of the weights for all sizes. The drop path is NOT
# known: this is that of Vim-S. The rest is as in the published scripts of T and S. The
# published figure is said, by others than the authors, to be that of the average.
model = dict(backbone=dict(arch='b', drop_path_rate=0.05), head=dict(in_channels=768))
custom_hooks = [dict(type='mmvssm.TimmEMAHook', decay=0.99996)]
