# The folder layout and the label convention are ADE20K's.
dataset_type = 'BaseSegDataset'
data_root = '{{$MMVSSM_QUICKSTART_ROOT:data/quickstart}}'
# Arguments with which tools/quickstart.py makes the data set (mmvssm.datasets).
generator = dict(num_train=480, num_val=96, size=128, seed=0)
metainfo = dict(
    classes=(
        'background',
        'striped disc',
        'zigzag square',
        'checked triangle',
        'rayed star',
        'dotted cross',
        'rippled hexagon',
        'photo ring',
    ),
    palette=[
        [70, 75, 85],
        [86, 180, 233],
        [0, 90, 181],
        [240, 228, 66],
        [213, 94, 0],
        [0, 158, 115],
        [204, 121, 167],
        [150, 60, 190],
    ],
)
crop_size = (128, 128)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
img_ratios = [0.75, 1.0, 1.25]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale_factor=r, keep_ratio=True) for r in img_ratios],
            [
                dict(type='RandomFlip', prob=0.0, direction='horizontal'),
                dict(type='RandomFlip', prob=1.0, direction='horizontal'),
            ],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        metainfo=metainfo,
        reduce_zero_label=True,
        data_root=data_root,
        data_prefix=dict(
            img_path='images/training', seg_map_path='annotations/training'
        ),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        metainfo=metainfo,
        reduce_zero_label=True,
        data_root=data_root,
        data_prefix=dict(
            img_path='images/validation', seg_map_path='annotations/validation'
        ),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
