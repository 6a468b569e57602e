# upernet_vim_t.py made small, with patches of 8 pixels, for the quickstart's data:
# make quickstart CONFIG=configs/upernet_vim_quickstart.py
_base_ = [
    './_base_/models/upernet_quickstart.py',
    './_base_/datasets/quickstart.py',
    './_base_/schedules/schedule_quickstart_plain.py',
    './_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        type='mmvssm.Vim',
        arch=dict(embed_dims=96, depth=6, patch_size=8, stride=8),
        img_size=128,
        drop_path_rate=0.0,
    ),
    # Strides of 4 to 32 pixels, as from patches of 16.
    neck=dict(
        type='mmvssm.Feature2Pyramid',
        embed_dim=96,
        rescales=[2, 1, 0.5, 0.25],
        norm_cfg={{_base_.norm_cfg}},
    ),
    decode_head=dict(in_channels=[96, 96, 96, 96]),
    auxiliary_head=dict(in_channels=96),
)
