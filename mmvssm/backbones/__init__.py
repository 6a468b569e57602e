"""Backbones, one file a family."""

from mmvssm.backbones.mambar import MambaR
from mmvssm.backbones.mlla import MLLA
from mmvssm.backbones.vim import Vim
from mmvssm.backbones.vssm import VSSM

__all__ = ['MLLA', 'VSSM', 'MambaR', 'Vim']
