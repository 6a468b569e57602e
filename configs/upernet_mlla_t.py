_base_ = [
    './_base_/models/upernet_mlla.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/schedule_160k.py',
    './_base_/default_runtime.py',
]
# The recipe of the published MLLA-B, with another drop path.
model = dict(
    backbone=dict(
        arch='t',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='mmvssm://mlla_t'),
    )
)
