# The quickstart's scenes as TIFF files of four bands: red, green, blue and height.
_base_ = './quickstart.py'
data_root = '{{$MMVSSM_QUICKSTART_FOUR_BANDS_ROOT:data/quickstart_four_bands}}'
generator = dict(bands=4)
# Numbers and order of the bands are those of the file.
load = dict(type='LoadImageFromFile', imdecode_backend='tifffile')
crop_size = (128, 128)
train_pipeline = [
    load,
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [load, dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
img_ratios = [0.75, 1.0, 1.25]
tta_pipeline = [
    load,
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
    dataset=dict(data_root=data_root, img_suffix='.tif', pipeline=train_pipeline)
)
val_dataloader = dict(
    dataset=dict(data_root=data_root, img_suffix='.tif', pipeline=test_pipeline)
)
test_dataloader = val_dataloader
