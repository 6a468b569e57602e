"""Recognise, convert and load checkpoints, and report what was loaded."""

from mmvssm.checkpoints.canonical import Checkpoint, convert
from mmvssm.checkpoints.errors import CheckpointError
from mmvssm.checkpoints.load import LoadReport, load_checkpoint
from mmvssm.checkpoints.unpickle import trust
from mmvssm.checkpoints.write import save_checkpoint

__all__ = [
    'Checkpoint',
    'CheckpointError',
    'LoadReport',
    'convert',
    'load_checkpoint',
    'save_checkpoint',
    'trust',
]
