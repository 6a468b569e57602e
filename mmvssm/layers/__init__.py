"""Building blocks that more than one backbone uses."""

from mmvssm.layers.bimamba import BidirectionalMamba, MambaBlock
from mmvssm.layers.drop_path import DropPath
from mmvssm.layers.linear_attention import DepthwiseConv2d, LinearAttention2d
from mmvssm.layers.maps import (
    LayerNorm2d,
    Linear2d,
    Mlp2d,
    PatchMerging2d,
    channels_last,
)
from mmvssm.layers.mlla_block import MLLABlock
from mmvssm.layers.norm import AddRMSNorm
from mmvssm.layers.position import resize_position
from mmvssm.layers.rotary import rotary_angles, rotary_tables
from mmvssm.layers.ss2d import SS2D, CascadeSS2D, VSSBlock
from mmvssm.layers.tokens import insert_tokens, split_tokens, token_positions
from mmvssm.ops.rotary import rotate

__all__ = [
    'SS2D',
    'CascadeSS2D',
    'MLLABlock',
    'PatchMerging2d',
    'VSSBlock',
    'AddRMSNorm',
    'BidirectionalMamba',
    'DepthwiseConv2d',
    'DropPath',
    'LayerNorm2d',
    'Linear2d',
    'LinearAttention2d',
    'MambaBlock',
    'Mlp2d',
    'channels_last',
    'insert_tokens',
    'resize_position',
    'rotary_angles',
    'rotary_tables',
    'rotate',
    'split_tokens',
    'token_positions',
]
