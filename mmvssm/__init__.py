"""Visual state-space backbones for mmsegmentation and mmdetection."""

from mmvssm import backbones, compat, layers, ops
from mmvssm.builders import build_backbone, build_classifier, list_models
from mmvssm.checkpoints import load_checkpoint
from mmvssm.families import Family, register_family

__version__ = '0.1.0'

__all__ = [
    'Family',
    'backbones',
    'build_backbone',
    'build_classifier',
    'list_models',
    'layers',
    'load_checkpoint',
    'ops',
    'register_family',
]

compat.apply()
