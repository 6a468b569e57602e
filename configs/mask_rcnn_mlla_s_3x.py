_base_ = [
    './_base_/models/mask_rcnn_mlla.py',
    './_base_/datasets/coco_instance_ms_crop.py',
    './_base_/schedules/schedule_3x_mlla.py',
    './_base_/default_runtime_det.py',
]
model = dict(
    backbone=dict(
        arch='s',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='mmvssm://mlla_s'),
    )
)
