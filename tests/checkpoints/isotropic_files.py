"""Small state dicts of Vim and Mamba® in the published formats."""

import torch
from torch import nn

from mmvssm.backbones import MambaR, Vim
from mmvssm.heads import ClassTokenHead, ImageClassifier, RegisterHead
from mmvssm.necks import PlainPyramid, SimpleFeaturePyramid

from .files import randomised

ARCH = dict(embed_dims=16, depth=4, patch_size=4, stride=4, d_state=4)


def vim_classifier(img_size=56, **options):
    options.setdefault('cls_token', 'middle')
    backbone = Vim(ARCH, img_size=img_size, classification=True, **options)
    return ImageClassifier(backbone, ClassTokenHead(16, 5))


def mambar_classifier(img_size=56, reduce=2, **options):
    backbone = MambaR(ARCH, img_size=img_size, classification=True, **options)
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


class Detector(nn.Module):
    """The shape of mmdet's two-stage detectors."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.neck = SimpleFeaturePyramid(16, 8)
        self.rpn_head = nn.Conv2d(8, 4, 1)


def published_detector(model):
    """Own names of a detector -> those of detectron2, with buffers and heads."""
    state = {}
    for key, value in randomised(model).items():
        part, rest = key.split('.', 1)
        if part == 'backbone':
            key = f'backbone.net.{rest}'
        elif part == 'neck':
            level, rest = rest.removeprefix('levels.').split('.', 1)
            key = f'backbone.simfp_{int(level) + 2}.{rest}'
        else:
            key = f'proposal_generator.{key}'
        state[key] = value
    state['backbone.net.rope.freqs_cos'] = torch.ones(196, 16)
    state['roi_heads.mask_head.predictor.weight'] = torch.ones(3, 8, 1, 1)
    state['pixel_mean'] = torch.ones(3, 1, 1)
    return state
