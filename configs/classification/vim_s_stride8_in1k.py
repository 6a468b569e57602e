_base_ = './vim_s_in1k.py'
# 30 epochs on, with patches every 8 pixels. The position embedding is resized with the
# class token's vector in its place in the middle; the published code takes the first
# vector for it.
model = dict(
    backbone=dict(arch='s_stride8', drop_path_rate=0.0), head=dict(in_channels=384)
)
# Or your own: work_dirs/vim_s_in1k/epoch_300.pth
load_from = 'mmvssm://vim_s'
# The same rate in all epochs: the first one and the last one are not scaled, and the
# peak is 5e-6 for 512 images.
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
param_scheduler = dict(warmup_lr=1e-5, eta_min=1e-5)
train_cfg = dict(max_epochs=30)
# 8 GPUs with 128 images each.
train_dataloader = dict(batch_size=128)
auto_scale_lr = dict(base_batch_size=1024)
