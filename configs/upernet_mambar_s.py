_base_ = [
    './_base_/models/upernet_mambar.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/schedule_160k_layer_decay.py',
    './_base_/default_runtime.py',
]
# Never published. Drop path 0.1 as Vim's segmentation and the first stage of
# Mamba®'s own training have it; layer decay 0.92 of Vim's config, same depth.
model = dict(
    backbone=dict(
        arch='s',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='mmvssm://mambar_s'),
    )
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.92))
