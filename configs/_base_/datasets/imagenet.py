# ImageNet-1K at 224x224, with the augmentations that all four families have in common.
# Set the environment variable IMAGENET_ROOT if your copy is in another folder. It has
# train/<class>/*.JPEG and val/<class>/*.JPEG.
dataset_type = 'ImageNet'
data_root = '{{$IMAGENET_ROOT:data/imagenet}}'
# Pillow, as published; it does not look at the orientation in a file's EXIF data.
load = dict(
    type='LoadImageFromFile',
    imdecode_backend='pillow',
    color_type='color_ignore_orientation',
)
crop = dict(
    type='RandomResizedCrop', scale=224, backend='pillow', interpolation='bicubic'
)
flip = dict(type='RandomFlip', prob=0.5, direction='horizontal')
train_pipeline = [
    load,
    crop,
    flip,
    # timm's rand-m9-mstd0.5-inc1, but computed by OpenCV, not by Pillow. timm ignores
    # colour jitter beside it.
    dict(
        type='RandAugment',
        policies='timm_increasing',
        num_policies=2,
        total_level=10,
        magnitude_level=9,
        magnitude_std=0.5,
        # The mean colour, in the order BGR.
        hparams=dict(pad_val=[104, 116, 124], interpolation='bicubic'),
    ),
    dict(type='PackInputs'),
]
test_pipeline = [
    load,
    dict(
        type='ResizeEdge',
        scale=256,
        edge='short',
        backend='pillow',
        interpolation='bicubic',
    ),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
# 8 GPUs with 128 images each.
train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type=dataset_type, data_root=data_root, split='train', pipeline=train_pipeline
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type, data_root=data_root, split='val', pipeline=test_pipeline
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator
