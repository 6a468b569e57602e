# 3-Augment with repeated augmentation: Mamba®'s first two stages.
_base_ = './imagenet_repeated.py'
train_pipeline = [
    _base_.load,
    _base_.crop,
    _base_.flip,
    dict(type='mmvssm.ThreeAugment', color_jitter=0.3),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
