"""Backbones, one file a family."""

from mmvssm.backbones.vssm import VSSM

__all__ = ['VSSM']
