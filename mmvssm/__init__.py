"""Visual state-space backbones for mmsegmentation and mmdetection."""

from mmvssm import compat, ops
from mmvssm.builders import build_backbone, build_classifier, list_models
from mmvssm.checkpoints import load_checkpoint

__version__ = '0.1.0'

__all__ = [
    'build_backbone',
    'build_classifier',
    'list_models',
    'load_checkpoint',
    'ops',
]

compat.apply()
