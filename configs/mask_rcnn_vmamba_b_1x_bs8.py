_base_ = './mask_rcnn_vmamba_b_1x.py'
# 8 GPUs x 1, with the learning rate of 16 images: nothing else was published.
train_dataloader = dict(batch_size=1)
auto_scale_lr = dict(base_batch_size=8)
