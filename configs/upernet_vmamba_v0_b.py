_base_ = [
    './_base_/models/upernet_vmamba.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/schedule_160k.py',
    './_base_/default_runtime.py',
]
# The first published version: no MLP, gated scan blocks, 16 states.
model = dict(
    backbone=dict(
        arch='b_v0',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='mmvssm://vmamba_b_v0'),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
