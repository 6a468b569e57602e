"""Small state dicts in the published formats."""

import copy
import re

import pytest
import torch

from mmvssm.backbones import VSSM
from mmvssm.backbones.vssm import ARCH_ZOO
from mmvssm.checkpoints import CheckpointError, load_checkpoint
from mmvssm.heads import ClassificationHead, ImageClassifier

V2 = dict(depths=(1, 2, 1, 1), dims=8)
V0 = {**ARCH_ZOO['t_v0'], **V2}


def classifier(arch, num_classes=5):
    backbone = VSSM(arch, out_indices=(3,), out_norm=False)
    return ImageClassifier(backbone, ClassificationHead(64, num_classes))


class Segmentor(torch.nn.Module):
    """The shape of mmseg's EncoderDecoder."""

    def __init__(self, arch, num_classes=4):
        super().__init__()
        self.backbone = VSSM(arch)
        self.decode_head = torch.nn.Conv2d(64, num_classes, 1)


def randomised(model):
    """State dict of the model with other numbers, names as in the model."""
    return {
        key: torch.randn_like(value) if value.is_floating_point() else value + 1
        for key, value in model.state_dict().items()
    }


def published(model):
    """Published classifier or backbone file with random numbers."""
    return {
        key.removeprefix('backbone.'): value for key, value in randomised(model).items()
    }


def to_v0_old(state):
    """Current names -> names of the original post."""
    renames = (
        ('patch_embed.0.', 'patch_embed.proj.'),
        ('patch_embed.2.', 'patch_embed.norm.'),
        (r'(blocks\.\d+)\.norm\.', r'\1.ln_1.'),
        (r'(blocks\.\d+)\.op\.', r'\1.self_attention.'),
        ('classifier.', ''),
    )

    def old(key):
        for new_name, old_name in renames:
            key = re.sub(new_name, old_name, key)
        return key

    return {old(key): value for key, value in state.items()}


def same(model, state, prefix=''):
    """Whether the model holds these numbers under these names."""
    own = model.state_dict()
    return all(torch.equal(own[prefix + key], value) for key, value in state.items())


def refuse(net, source, message):
    """The file is refused with this message, and no weight changes."""
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(net, source)
    assert same(net, before)
