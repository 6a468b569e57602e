_base_ = './mambar_b_stage3_in1k.py'
# OURS: the third stage once more, at 384x384, from the published weights.
# No result is published.
model = dict(backbone=dict(img_size=384))
crop = dict(_base_.crop, scale=384)
train_pipeline = [_base_.load, crop, *_base_.train_pipeline[2:]]
test_pipeline = [
    _base_.load,
    dict(_base_.test_pipeline[1], scale=384),
    dict(type='CenterCrop', crop_size=384),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
load_from = 'mmvssm://mambar_b'
