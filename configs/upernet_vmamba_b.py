_base_ = [
    './_base_/models/upernet_vmamba.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/schedule_160k.py',
    './_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        arch='b_s2l15',
        drop_path_rate=0.6,
        init_cfg=dict(type='Pretrained', checkpoint='mmvssm://vmamba_b_s2l15'),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
