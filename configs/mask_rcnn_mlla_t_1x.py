_base_ = [
    './_base_/models/mask_rcnn_mlla.py',
    './_base_/datasets/coco_instance_ms_crop.py',
    './_base_/schedules/schedule_1x_mlla.py',
    './_base_/default_runtime_det.py',
]
model = dict(
    backbone=dict(
        arch='t',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='mmvssm://mlla_t'),
    )
)
