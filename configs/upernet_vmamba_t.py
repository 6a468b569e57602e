_base_ = [
    './_base_/models/upernet_vmamba.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/schedule_160k.py',
    './_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        arch='t_s1l8',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='mmvssm://vmamba_t_s1l8'),
    )
)
