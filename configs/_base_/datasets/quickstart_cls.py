# The folders are laid out as ImageNet's.
dataset_type = 'CustomDataset'
data_root = '{{$MMVSSM_QUICKSTART_CLS_ROOT:data/quickstart_cls}}'
# Arguments with which tools/quickstart.py makes the data set (mmvssm.datasets).
generator = dict(layout='imagenet', num_train=2100, num_val=280, size=128, seed=0)
metainfo = dict(
    # In the order of the folders' names.
    classes=(
        'checked triangle',
        'dotted cross',
        'photo ring',
        'rayed star',
        'rippled hexagon',
        'striped disc',
        'zigzag square',
    ),
    palette=[
        (240, 228, 66),
        (0, 158, 115),
        (150, 60, 190),
        (213, 94, 0),
        (204, 121, 167),
        (86, 180, 233),
        (0, 90, 181),
    ],
)
crop_size = 128
data_preprocessor = dict(
    num_classes=7,
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    to_rgb=True,
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='CenterCrop', crop_size=crop_size),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        metainfo=metainfo,
        data_root=data_root,
        data_prefix=dict(img_path='train'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        metainfo=metainfo,
        data_root=data_root,
        data_prefix=dict(img_path='val'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type='Accuracy', topk=(1,))
test_evaluator = [
    val_evaluator,
    dict(type='SingleLabelMetric', items=('precision', 'recall'), average=None),
    dict(type='ConfusionMatrix'),
]
