"""Visual state-space backbones for mmsegmentation and mmdetection."""

from mmvssm import openmp

# Before anything loads torch.
openmp.shorten_wait()

from mmvssm import backbones, compat, layers, ops
from mmvssm.builders import build_backbone, build_classifier, list_models
from mmvssm.checkpoints import load_checkpoint
from mmvssm.export.library import onnx_library
from mmvssm.families import Family, register_family
from mmvssm.pretrained import load_pretrained, save_pretrained

__version__ = '0.1.0'

__all__ = [
    'Family',
    'backbones',
    'build_backbone',
    'build_classifier',
    'list_models',
    'layers',
    'load_checkpoint',
    'load_pretrained',
    'onnx_library',
    'ops',
    'register_family',
    'save_pretrained',
]

compat.apply()
compat.import_behind_inferencers('mmvssm.engine')
compat.import_behind_model_hub('mmvssm.classification.index')
