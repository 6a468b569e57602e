# For `tools/run_ablation.py --data`: the rows of configs/ablation, ablation_scan,
# ablation_registers or ablation_vim as small classifiers. The images are drawn as those
# of the quickstart and taken at half their resolution. They are more, so that each is
# seen three or four times and no row learns them by heart. Make them with
#     python tools/make_quickstart_data.py --classification --num-train 14000 \
#         --num-val 2100 --root data/ablation_cls
_base_ = ['./datasets/quickstart_cls.py', './default_runtime_cls.py']
data_root = 'data/ablation_cls'
generator = dict(num_train=14000, num_val=2100)
resize = dict(type='Resize', scale=(64, 64))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=128),
    resize,
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='CenterCrop', crop_size=128),
    resize,
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=16, dataset=dict(data_root=data_root, pipeline=train_pipeline)
)
test_dataloader = dict(dataset=dict(data_root=data_root, pipeline=test_pipeline))
# The row whose backbone has this type gets these arguments.
backbones = [
    dict(
        type='mmvssm.LinearAttentionStudy',
        arch='small',
        img_size=64,
        drop_path_rate=0.0,
    ),
    dict(
        type='mmvssm.MLLA',
        arch=dict(_delete_=True, depths=(1, 1, 2, 1), dims=32, num_heads=(2, 4, 8, 16)),
        drop_path_rate=0.0,
    ),
    # Without _delete_: the switches of a row are in its arch.
    dict(
        type='mmvssm.VSSM',
        arch=dict(depths=(1, 1, 2, 1), dims=32),
        drop_path_rate=0.0,
    ),
    # 64 patches. A number of registers is not in the arch.
    dict(
        type='mmvssm.MambaR',
        arch=dict(_delete_=True, embed_dims=64, depth=4, patch_size=8, stride=8),
        img_size=64,
        drop_path_rate=0.0,
    ),
    dict(
        type='mmvssm.Vim',
        arch=dict(_delete_=True, embed_dims=64, depth=4, patch_size=8, stride=8),
        img_size=64,
        drop_path_rate=0.0,
    ),
]
# The head gets its channels and classes from the row and the data.
model = dict(
    type='mmpretrain.ImageClassifier',
    head=dict(
        type='mmvssm.PooledClsHead',
        in_channels=256,
        num_classes=7,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)

max_iters = 3000
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, weight_decay=0.05, fused=True),
    constructor='mmvssm.GroupedOptimWrapperConstructor',
    paramwise_cfg=dict(flat_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(
        type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=30, end=max_iters
    ),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters)
# Tested once, at the end.
val_dataloader = val_cfg = val_evaluator = None
test_cfg = dict(type='TestLoop')
test_evaluator = [dict(type='Accuracy', topk=(1,))]
# None of a row that is a classifier by itself, such as averages of its weights.
custom_hooks = []
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='mmvssm.SafeCheckpointHook', by_epoch=False, interval=250, max_keep_ckpts=1
    ),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='VisualizationHook', enable=False),
)
