"""The block of MLLA: Mamba's block with linear attention instead of the scan.

Names of parameters are those of the published code (arXiv 2405.16605).
"""

import torch
import torch.nn.functional as F
from torch import nn

from mmvssm.layers.drop_path import DropPath
from mmvssm.layers.linear_attention import DepthwiseConv2d, LinearAttention2d
from mmvssm.layers.maps import LayerNorm2d, Linear2d, Mlp2d
from mmvssm.registry import MODELS


@MODELS.register_module()
class MLLABlock(nn.Module):
    """Gated linear attention and an MLP, each after a position encoding.

    ``x + cpe1(x)``; then the sum of that and
    ``out_proj(attn(SiLU(dwc(in_proj(n)))) * SiLU(act_proj(n)))`` with
    ``n = norm1(x)``; then ``x + cpe2(x)`` and ``x + mlp(norm2(x))``.

    Args:
        channels: C of the maps.
        heads: Heads of the attention.
        mlp_ratio: Hidden channels of the MLP relative to C.
        drop_path: Probability that a branch of a sample is dropped. Position encodings
            are never dropped.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.cpe1 = DepthwiseConv2d(channels)
        self.norm1 = LayerNorm2d(channels)
        self.in_proj = Linear2d(channels, channels)
        self.act_proj = Linear2d(channels, channels)
        self.dwc = DepthwiseConv2d(channels)
        self.attn = LinearAttention2d(channels, heads)
        self.out_proj = Linear2d(channels, channels)
        self.drop_path = DropPath(drop_path)
        self.cpe2 = DepthwiseConv2d(channels)
        self.norm2 = LayerNorm2d(channels)
        self.mlp = Mlp2d(channels, int(mlp_ratio * channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) -> map (B, C, H, W)."""
        x = x + self.cpe1(x)
        x = x + self.drop_path(self._mix(self.norm1(x)))
        x = x + self.cpe2(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _mix(self, x: torch.Tensor) -> torch.Tensor:
        gate = F.silu(self.act_proj(x))
        x = F.silu(self.dwc(self.in_proj(x)))
        return self.out_proj(self.attn(x) * gate)
