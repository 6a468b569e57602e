_base_ = [
    '../_base_/models/classifier_mambar.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/schedule_imagenet_mambar.py',
    '../_base_/default_runtime_imagenet.py',
]
# The last of three trainings: 20 epochs at 224x224, with other augmentations.
model = dict(backbone=dict(drop_path_rate=0.4))
# Tests without a crop.
test_pipeline = [
    _base_.load,
    dict(_base_.test_pipeline[1], scale=224),
    *_base_.test_pipeline[2:],
]
# 8 GPUs with 64 images each.
train_dataloader = dict(batch_size=64)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
load_from = 'work_dirs/mambar_b_stage2_in1k/epoch_100.pth'
# This rate is not scaled by the batch. After the warm-up it is the last one, too.
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=0.1))
train_cfg = dict(max_epochs=20)
auto_scale_lr = dict(base_batch_size=512)
