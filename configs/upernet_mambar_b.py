_base_ = [
    './_base_/models/upernet_mambar.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/schedule_160k_layer_decay.py',
    './_base_/default_runtime.py',
]
# Not published. Drop path 0.3 is between the 0.1 and 0.4 of the stages of Mamba®'s own
# training, because a larger model overfits sooner. Layer decay 0.92 is that of Vim.
model = dict(
    backbone=dict(
        arch='b',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint='mmvssm://mambar_b'),
    ),
    neck=dict(channels=768),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.92))
