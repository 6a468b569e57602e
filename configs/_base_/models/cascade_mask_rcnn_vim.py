_base_ = './mask_rcnn_plain.py'
# The heads of ViTDet, as published: two convolutions in the RPN; four convolutions with
# norms and a linear layer in each box head; convolutions with norms in the mask head.
# Boxes are refined three times, in the same way for all classes. One difference from
# the published models: every stage has a mask head, as in mmdet, and their outputs are
# averaged.
num_classes = 80
norm_cfg = dict(type='mmvssm.LayerNorm2d', eps=1e-6)
box_heads = [
    dict(
        type='Shared4Conv1FCBBoxHead',
        in_channels=256,
        conv_out_channels=256,
        fc_out_channels=1024,
        roi_feat_size=7,
        num_classes=num_classes,
        norm_cfg=norm_cfg,
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=target_stds),
        reg_class_agnostic=True,
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=1.0),
    )
    for target_stds in (
        [0.1, 0.1, 0.2, 0.2],
        [0.05, 0.05, 0.1, 0.1],
        [0.033, 0.033, 0.067, 0.067],
    )
]
box_stages = [
    dict(
        assigner=dict(
            type='MaxIoUAssigner',
            pos_iou_thr=overlap,
            neg_iou_thr=overlap,
            min_pos_iou=overlap,
            match_low_quality=False,
            ignore_iof_thr=-1,
        ),
        sampler=dict(
            type='RandomSampler',
            num=512,
            pos_fraction=0.25,
            neg_pos_ub=-1,
            add_gt_as_proposals=True,
        ),
        mask_size=28,
        pos_weight=-1,
        debug=False,
    )
    for overlap in (0.5, 0.6, 0.7)
]
model = dict(
    type='CascadeRCNN',
    # Images are padded to squares after the mean is subtracted.
    data_preprocessor=dict(pad_size_divisor=1024),
    backbone=dict(average=False, rope=True, rope_residual=True),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        type='CascadeRoIHead',
        num_stages=3,
        # The published stages weigh a third each where they meet in the pyramid.
        stage_loss_weights=[1 / 3, 1 / 3, 1 / 3],
        bbox_head=box_heads,
        mask_head=dict(norm_cfg=norm_cfg),
    ),
    train_cfg=dict(rcnn=box_stages),
)
