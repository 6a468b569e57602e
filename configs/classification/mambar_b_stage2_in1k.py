_base_ = [
    '../_base_/models/classifier_mambar.py',
    '../_base_/datasets/imagenet_three_augment.py',
    '../_base_/schedules/schedule_imagenet_mambar.py',
    '../_base_/default_runtime_imagenet.py',
]
# The second of three trainings: 100 epochs at 224x224.
model = dict(
    backbone=dict(drop_path_rate=0.4),
    # Without smoothing.
    head=dict(loss=dict(label_smooth_val=0.0)),
)
load_from = 'work_dirs/mambar_b_stage1_in1k/epoch_300.pth'
# 2e-4 for 512 images.
optim_wrapper = dict(optimizer=dict(lr=4e-4))
train_cfg = dict(max_epochs=100)
