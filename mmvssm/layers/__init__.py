"""Building blocks that more than one backbone uses."""

from mmvssm.layers.drop_path import DropPath
from mmvssm.layers.maps import LayerNorm2d, Linear2d, Mlp2d

__all__ = ['DropPath', 'LayerNorm2d', 'Linear2d', 'Mlp2d']
