_base_ = [
    '../_base_/models/classifier_mlla.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/schedule_imagenet_mlla.py',
    '../_base_/default_runtime_imagenet.py',
]
model = dict(
    ratio=2.0,
    backbone=dict(arch='b', drop_path_rate=0.5),
    head=dict(in_channels=768),
)
# 64 GPUs with 64 images each.
train_dataloader = dict(batch_size=64)
