_base_ = [
    './_base_/models/mask_rcnn_plain.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/schedule_1x.py',
    './_base_/default_runtime_det.py',
]
# Not published. Drop path as in upernet_mambar_s.py. Layer decay as in the cascade with
# a Vim of this size.
model = dict(
    backbone=dict(
        type='mmvssm.MambaR',
        arch='s',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='mmvssm://mambar_s'),
    ),
    neck=dict(in_channels=384),
)
optim_wrapper = dict(
    constructor='mmvssm.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(_delete_=True, layer_decay_rate=0.837),
)
