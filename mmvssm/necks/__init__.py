"""Necks for plain backbones."""

from mmvssm.necks.pyramid import PlainPyramid

__all__ = ['PlainPyramid']
