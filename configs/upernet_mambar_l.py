_base_ = [
    './_base_/models/upernet_mambar.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/schedule_160k_layer_decay.py',
    './_base_/default_runtime.py',
]
# Not published. Drop path 0.4 is that of the last stage of Mamba®'s own training. Layer
# decay is 0.96: at twice the depth it gives the stem the same rate as Vim's 0.92.
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
