_base_ = [
    './_base_/models/upernet_vim.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/schedule_60k_vim.py',
    './_base_/default_runtime.py',
]
# As published: also rotary position embeddings, directions added up instead of
# averaged, and the residual stream as features.
model = dict(
    backbone=dict(
        arch='s',
        rope=True,
        rope_residual=True,
        average=False,
        feature='residual',
        last_layer_process='add',
        init_cfg=dict(type='Pretrained', checkpoint='mmvssm://vim_s'),
    ),
    neck=dict(embed_dim=384),
    decode_head=dict(in_channels=[384, 384, 384, 384], channels=384),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.95))
# 4 GPUs x 8
train_dataloader = dict(batch_size=8)
