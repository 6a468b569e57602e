_base_ = [
    './_base_/models/mask_rcnn_vmamba.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/schedule_1x.py',
    './_base_/default_runtime_det.py',
]
model = dict(
    backbone=dict(
        arch='t_s1l8',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='mmvssm://vmamba_t_s1l8'),
    )
)
