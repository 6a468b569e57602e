_base_ = [
    './_base_/models/mask_rcnn_vmamba.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/schedule_1x.py',
    './_base_/default_runtime_det.py',
]
# The first published version: no MLP, gated scan blocks, 16 states.
model = dict(
    backbone=dict(
        arch='s_v0',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='mmvssm://vmamba_s_v0'),
    ),
)
