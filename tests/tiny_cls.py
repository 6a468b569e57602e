"""Classifiers of MMPretrain small enough to train in a test, one of each family."""

PLAIN = dict(embed_dims=16, depth=2, patch_size=4, stride=4, d_state=4)
# Family -> backbone and head of a config.
PARTS = {
    'vmamba': (
        dict(
            type='mmvssm.VSSM',
            arch=dict(depths=(1, 1), dims=8),
            out_indices=(1,),
            out_norm=False,
            drop_path_rate=0.0,
        ),
        dict(type='mmvssm.PooledClsHead', in_channels=16),
    ),
    'vim': (
        dict(
            type='mmvssm.Vim',
            arch=PLAIN,
            img_size=32,
            classification=True,
            cls_token='middle',
            drop_path_rate=0.0,
        ),
        dict(type='mmvssm.ClassTokenClsHead', in_channels=16),
    ),
    'mambar': (
        dict(
            type='mmvssm.MambaR',
            arch=dict(PLAIN, registers=3),
            img_size=32,
            classification=True,
            drop_path_rate=0.0,
        ),
        dict(type='mmvssm.RegisterClsHead', in_channels=16, num_registers=3, reduce=2),
    ),
    'mlla': (
        dict(
            type='mmvssm.MLLA',
            arch=dict(depths=(1, 1), dims=16, num_heads=(2, 4)),
            out_indices=(1,),
            out_norm=False,
            drop_path_rate=0.0,
        ),
        dict(type='mmvssm.PooledClsHead', in_channels=32),
    ),
}


def model_config(family='vmamba', num_classes=3, **more):
    """Config of an ``ImageClassifier``; ``more`` goes into the head."""
    backbone, head = PARTS[family]
    return dict(
        type='mmpretrain.ImageClassifier',
        data_preprocessor=dict(
            num_classes=num_classes, mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True
        ),
        backbone=dict(backbone),
        head=dict(head, num_classes=num_classes, **more),
    )


def build(family='vmamba', num_classes=3, **more):
    """Build it, as a runner under the scope of MMPretrain would."""
    from mmengine.registry import DefaultScope
    from mmpretrain.registry import MODELS

    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(model_config(family, num_classes, **more))
