"""Small state dicts of Vim and Mamba® in the published formats."""

import torch
from torch import nn

from mmvssm.backbones import MambaR, Vim
from mmvssm.heads import ClassTokenHead, ImageClassifier, RegisterHead
from mmvssm.necks import PlainPyramid

from .files import randomised

ARCH = dict(embed_dims=16, depth=4, patch_size=4, stride=4, d_state=4)


def vim_classifier(img_size=56, **options):
    options.setdefault('cls_token', 'middle')
    backbone = Vim(ARCH, img_size, classification=True, **options)
    return ImageClassifier(backbone, ClassTokenHead(16, 5))


def mambar_classifier(img_size=56, reduce=2, **options):
    backbone = MambaR(ARCH, img_size, classification=True, **options)
    return ImageClassifier(
        backbone, RegisterHead(16, 5, backbone.num_registers, reduce)
    )


class Segmentor(nn.Module):
    """The shape of mmseg's EncoderDecoder with a neck."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.neck = PlainPyramid(16)
        self.decode_head = nn.Conv2d(16, 4, 1)


def published(model):
    """Published names: no prefixes, the pyramid inside the backbone."""
    return {
        key.removeprefix('backbone.').removeprefix('classifier.'): value
        for key, value in randomised(model).items()
    }


def published_segmentor(model):
    """Own names of a segmentor -> published ones."""
    names = (
        ('neck.upsample_4x.', 'backbone.fpn1.'),
        ('neck.upsample_2x.', 'backbone.fpn2.'),
    )
    state = {}
    for key, value in randomised(model).items():
        for own, theirs in names:
            key = key.replace(own, theirs)
        state[key] = value
    # Built by the published code and never used.
    state['backbone.norm_f.weight'] = torch.ones(16)
    return state
