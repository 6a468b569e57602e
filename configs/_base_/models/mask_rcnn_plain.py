_base_ = './mask_rcnn_vmamba.py'
# An isotropic backbone gives one map. The neck makes five maps from it.
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmvssm.Vim',
        arch='t',
        img_size=1024,
        out_indices=(23,),
        drop_path_rate=0.1,
        last_layer_process='add',
    ),
    neck=dict(
        _delete_=True,
        type='mmvssm.SimpleFeaturePyramid',
        in_channels=192,
        out_channels=256,
        num_outs=5,
    ),
)
