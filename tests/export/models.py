"""Small models with two blocks a stage, with weights that give lively outputs."""

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope

from families import PLAIN, V0
from mmvssm.backbones import MLLA, VSSM, MambaR, Vim
from mmvssm.families import families
from mmvssm.heads import ImageClassifier

LAST = dict(out_indices=(1,), out_norm=False)
BACKBONES = {
    'vmamba_v0': lambda: VSSM(V0 | dict(depths=(2, 2)), **LAST),
    'vmamba': lambda: VSSM(dict(depths=(2, 2), dims=16), **LAST),
    'vim': lambda: Vim(PLAIN, img_size=32, cls_token='middle', classification=True),
    'mambar': lambda: MambaR(
        dict(PLAIN, registers=3), img_size=32, classification=True
    ),
    'mlla': lambda: MLLA(dict(depths=(2, 2), dims=16, num_heads=(2, 4)), **LAST),
}
_UPERNET = """
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor', mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375], bgr_to_rgb=True, size=(64, 96)),
    backbone=dict({backbone}),
    {neck}
    decode_head=dict(
        type='UPerHead', in_channels={channels}, in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6), channels=16, num_classes=5,
        norm_cfg=dict(type='BN'), align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss')),
    test_cfg=dict(mode='whole'))
"""
_VIM = (
    "type='mmvssm.Vim', arch=dict(embed_dims=16, depth=4, patch_size=8, stride=8), "
    'img_size=64, out_indices=(0, 1, 2, 3)'
)
_PYRAMID = (
    "neck=dict(type='mmvssm.Feature2Pyramid', embed_dim=16, rescales=[2, 1, 0.5, "
    "0.25], norm_cfg=dict(type='BN')),"
)
SEGMENTORS = {
    'vmamba': dict(
        backbone="type='mmvssm.VSSM', arch=dict(depths=(2, 1, 1, 1), dims=8)",
        neck='',
        channels=[8, 16, 32, 64],
    ),
    'vim': dict(backbone=_VIM, neck=_PYRAMID, channels=[16] * 4),
}


def enliven(model, seed=0):
    """Change weights and statistics, so that no layer is all but idle."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith(('running_mean', 'running_var')):
                buffer.add_(0.2 * torch.rand(buffer.shape, generator=generator))
    return model.eval()


def classifier(name):
    """Ten classes."""
    torch.manual_seed(0)
    backbone = BACKBONES[name]()
    family = max(
        (f for f in families() if name.startswith(f.name)), key=lambda f: len(f.name)
    )
    return enliven(ImageClassifier(backbone, family.head(backbone, 't', 10)))


def segmentor(name, **changes):
    """A UPerNet with five classes; changes are entries of the config."""
    init_default_scope('mmseg')
    cfg = Config.fromstring(_UPERNET.format(**SEGMENTORS[name]), '.py')
    cfg.merge_from_dict(changes)
    torch.manual_seed(0)
    return enliven(revert_sync_batchnorm(MODELS.build(cfg.model)))
