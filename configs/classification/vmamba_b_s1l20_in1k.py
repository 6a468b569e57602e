_base_ = [
    '../_base_/models/classifier_vmamba.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/schedule_imagenet_vmamba.py',
    '../_base_/default_runtime_imagenet.py',
]
model = dict(
    backbone=dict(arch='b_s1l20', drop_path_rate=0.5),
    head=dict(in_channels=1024),
)
