_base_ = [
    '../_base_/models/classifier_vim.py',
    '../_base_/datasets/imagenet_repeated.py',
    '../_base_/schedules/schedule_imagenet_vim.py',
    '../_base_/default_runtime_imagenet.py',
]
model = dict(backbone=dict(arch='s', drop_path_rate=0.05), head=dict(in_channels=384))
# 8 GPUs with 64 images each, at the rate that the other sizes have for 1024.
train_dataloader = dict(batch_size=64)
auto_scale_lr = dict(base_batch_size=512)
