_base_ = [
    './_base_/models/mask_rcnn_plain.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/schedule_1x.py',
    './_base_/default_runtime_det.py',
]
# Not published. Drop path as in upernet_mambar_b.py. Layer decay as in the cascade with
# a Vim of this size.
model = dict(
    backbone=dict(
        type='mmvssm.MambaR',
        arch='b',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='mmvssm://mambar_b'),
    ),
    neck=dict(in_channels=768),
)
optim_wrapper = dict(
    constructor='mmvssm.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(_delete_=True, layer_decay_rate=0.7),
)
