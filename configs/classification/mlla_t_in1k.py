_base_ = [
    '../_base_/models/classifier_mlla.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/schedule_imagenet_mlla.py',
    '../_base_/default_runtime_imagenet.py',
]
# 32 GPUs with 128 images each.
