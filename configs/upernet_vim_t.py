_base_ = [
    './_base_/models/upernet_vim.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/schedule_60k_vim.py',
    './_base_/default_runtime.py',
]
# As published: outputs of the blocks as features, stream in the model's dtype.
model = dict(
    backbone=dict(
        arch='t',
        residual_in_fp32=False,
        init_cfg=dict(type='Pretrained', checkpoint='mmvssm://vim_t'),
    )
)
# 4 GPUs x 8
train_dataloader = dict(batch_size=8)
