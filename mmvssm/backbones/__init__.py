"""Backbones, one file for each family."""

from mmvssm.backbones.linear_attention_study import LinearAttentionStudy
from mmvssm.backbones.mambar import MambaR
from mmvssm.backbones.mlla import MLLA
from mmvssm.backbones.padding import set_img_shapes
from mmvssm.backbones.vim import Vim
from mmvssm.backbones.vssm import VSSM

__all__ = ['MLLA', 'VSSM', 'LinearAttentionStudy', 'MambaR', 'Vim', 'set_img_shapes']
