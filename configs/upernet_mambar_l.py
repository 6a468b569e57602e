_base_ = [
    './_base_/models/upernet_mambar.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/schedule_160k_layer_decay.py',
    './_base_/default_runtime.py',
]
# Never published. Drop path 0.4 of the last stage of Mamba®'s own training; layer
# decay 0.96, which at twice the depth leaves the stem the rate of Vim's 0.92.
model = dict(
    backbone=dict(
        arch='l',
        out_indices=(11, 23, 35, 47),
        drop_path_rate=0.4,
        with_cp=True,
        init_cfg=dict(type='Pretrained', checkpoint='mmvssm://mambar_l'),
    ),
    neck=dict(channels=1024),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024]),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.96))
