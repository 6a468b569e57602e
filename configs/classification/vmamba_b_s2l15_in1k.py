_base_ = [
    '../_base_/models/classifier_vmamba.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/schedule_imagenet_vmamba.py',
    '../_base_/default_runtime_imagenet.py',
]
model = dict(
    backbone=dict(arch='b_s2l15', drop_path_rate=0.6),
    head=dict(in_channels=1024),
)
