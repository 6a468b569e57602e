_base_ = [
    './_base_/models/mask_rcnn_plain.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/schedule_1x.py',
    './_base_/default_runtime_det.py',
]
# Not published. Drop path and layer decay are those of the published cascade. Positions
# and directions are as in Vim's own training.
model = dict(
    backbone=dict(
        arch='s', init_cfg=dict(type='Pretrained', checkpoint='mmvssm://vim_s')
    ),
    neck=dict(in_channels=384),
)
optim_wrapper = dict(
    constructor='mmvssm.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(_delete_=True, layer_decay_rate=0.837),
)
