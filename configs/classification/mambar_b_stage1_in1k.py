_base_ = [
    '../_base_/models/classifier_mambar.py',
    '../_base_/datasets/imagenet_three_augment.py',
    '../_base_/schedules/schedule_imagenet_mambar.py',
    '../_base_/default_runtime_imagenet.py',
]
# The first of three trainings, at 128x128.
crop = dict(_base_.crop, scale=128)
train_pipeline = [_base_.load, crop, *_base_.train_pipeline[2:]]
test_pipeline = [
    _base_.load,
    dict(_base_.test_pipeline[1], scale=146),
    dict(type='CenterCrop', crop_size=128),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
model = dict(
    backbone=dict(img_size=128, drop_path_rate=0.1),
    # Without smoothing.
    head=dict(loss=dict(label_smooth_val=0.0)),
)
