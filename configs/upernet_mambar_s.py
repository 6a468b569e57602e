_base_ = [
    './_base_/models/upernet_mambar.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/schedule_160k_layer_decay.py',
    './_base_/default_runtime.py',
]
# Not published. Drop path 0.1 is that of Vim's segmentation, and that of the first
# stage of Mamba®'s own training. Layer decay 0.92 is that of Vim's config of the same
# depth.
model = dict(
    backbone=dict(
        arch='s',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='mmvssm://mambar_s'),
    )
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.92))
