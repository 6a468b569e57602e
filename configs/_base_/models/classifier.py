# A family's config adds its backbone and head.
model = dict(
    type='mmpretrain.ImageClassifier',
    data_preprocessor=dict(
        type='mmvssm.ClsDataPreprocessor',
        num_classes=1000,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True,
        # In training, as timm's.
        mixup=0.8,
        cutmix=1.0,
        erase=0.25,
    ),
    head=dict(
        num_classes=1000,
        # Soft labels, smoothed, in cross-entropy.
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)
