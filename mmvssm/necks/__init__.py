"""Necks for isotropic backbones."""

from mmvssm.necks.pyramid import PlainPyramid
from mmvssm.necks.simple_feature_pyramid import SimpleFeaturePyramid

__all__ = ['PlainPyramid', 'SimpleFeaturePyramid']
