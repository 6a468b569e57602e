_base_ = [
    './_base_/models/mask_rcnn_vmamba.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/schedule_1x.py',
    './_base_/default_runtime_det.py',
]
model = dict(
    backbone=dict(
        arch='b_s2l15',
        drop_path_rate=0.6,
        init_cfg=dict(type='Pretrained', checkpoint='mmvssm://vmamba_b_s2l15'),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
