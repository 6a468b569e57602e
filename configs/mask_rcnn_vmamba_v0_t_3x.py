_base_ = [
    './_base_/models/mask_rcnn_vmamba.py',
    './_base_/datasets/coco_instance_ms_crop.py',
    './_base_/schedules/schedule_3x.py',
    './_base_/default_runtime_det.py',
]
# The first published version: no MLP, gated scan blocks, 16 states.
model = dict(
    backbone=dict(
        arch='t_v0',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='mmvssm://vmamba_t_v0'),
    ),
)
