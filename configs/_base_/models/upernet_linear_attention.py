_base_ = './upernet_vmamba.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmvssm.LinearAttentionStudy',
        arch='t',
        img_size=512,
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
    )
)
