# A VMamba-UperNet small enough to train in minutes on two CPU cores, on the
# data set that tools/make_quickstart_data.py makes. `make quickstart` runs it.
_base_ = [
    './_base_/models/upernet_quickstart.py',
    './_base_/datasets/quickstart.py',
    './_base_/schedules/schedule_quickstart.py',
    './_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        type='mmvssm.VSSM',
        arch=dict(dims=32, depths=(1, 1, 3, 1)),
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.0,
    ),
    decode_head=dict(in_channels=[32, 64, 128, 256]),
    auxiliary_head=dict(in_channels=128),
)
