_base_ = [
    './_base_/models/cascade_mask_rcnn_vim.py',
    './_base_/datasets/coco_instance_lsj.py',
    './_base_/schedules/schedule_100ep_lsj.py',
    './_base_/default_runtime_det.py',
]
model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='mmvssm://vim_t'))
)
log_processor = dict(by_epoch=False)
