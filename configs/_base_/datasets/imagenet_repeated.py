# Repeated augmentation (DeiT): each image three times, of which an epoch takes a third.
_base_ = './imagenet.py'
train_dataloader = dict(
    sampler=dict(
        _delete_=True, type='mmvssm.DeiTRepeatAugSampler', num_repeats=3, shuffle=True
    )
)
