# upernet_vmamba_quickstart.py for images of four bands, on the same scenes:
# make quickstart CONFIG=configs/upernet_vmamba_four_bands_quickstart.py
# It starts from random weights. --pretrained FILE takes those of a model of three
# bands; the filters of the stem are then adapted to four.
_base_ = [
    './_base_/models/upernet_quickstart.py',
    './_base_/datasets/quickstart_four_bands.py',
    './_base_/schedules/schedule_quickstart.py',
    './_base_/default_runtime.py',
]
model = dict(
    # Means and deviations of the bands, in the order of the file. There is no BGR.
    data_preprocessor=dict(
        type='mmvssm.SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53, 89.0],
        std=[58.395, 57.12, 57.375, 84.0],
        bgr_to_rgb=False,
    ),
    backbone=dict(
        type='mmvssm.VSSM',
        in_channels=4,
        arch=dict(dims=32, depths=(1, 1, 3, 1)),
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.0,
    ),
    decode_head=dict(in_channels=[32, 64, 128, 256]),
    auxiliary_head=dict(in_channels=128),
)
