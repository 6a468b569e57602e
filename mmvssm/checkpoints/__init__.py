"""Recognise, convert and load checkpoints, and report what was loaded."""

from mmvssm.backbones.base import set_pretrained_loader, set_state_converter
from mmvssm.checkpoints.canonical import Checkpoint, convert
from mmvssm.checkpoints.classifier import convert_for_classifier
from mmvssm.checkpoints.load import LoadReport, load_checkpoint
from mmvssm.checkpoints.unpickle import trust
from mmvssm.checkpoints.write import save_checkpoint
from mmvssm.errors import CheckpointError

__all__ = [
    'Checkpoint',
    'CheckpointError',
    'LoadReport',
    'convert',
    'load_checkpoint',
    'save_checkpoint',
    'trust',
]

set_pretrained_loader(load_checkpoint)
set_state_converter(convert_for_classifier)
