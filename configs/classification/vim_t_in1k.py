_base_ = [
    '../_base_/models/classifier_vim.py',
    '../_base_/datasets/imagenet_repeated.py',
    '../_base_/schedules/schedule_imagenet_vim.py',
    '../_base_/default_runtime_imagenet.py',
]
# As in the published script; the paper has a weight decay of 0.05 for all sizes.
optim_wrapper = dict(optimizer=dict(weight_decay=0.1))
