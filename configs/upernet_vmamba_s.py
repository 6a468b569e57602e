_base_ = [
    './_base_/models/upernet_vmamba.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/schedule_160k.py',
    './_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        arch='s_s2l15',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='mmvssm://vmamba_s_s2l15'),
    )
)
