"""Linear attention on maps, and the depthwise convolutions around it."""

import torch
from torch import nn

from mmvssm.layers.linear import Linear
from mmvssm.layers.rotary import rotary_tables
from mmvssm.ops import linear_attention


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise 3x3 convolution with a bias, which keeps the size of the map.

    If its output is added to its input, it is the conditional position encoding (CPE,
    arXiv 2102.10882). If it works on the values and is added to the output of an
    attention, it is the locally enhanced one (LePE, arXiv 2107.00652).

    Args:
        channels: C of the maps (B, C, H, W).
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1, groups=channels)


class LinearAttention2d(nn.Module):
    """Linear attention over all positions of a map, as in MLLA.

    Queries and keys are projections of the map. The values are the map itself. The
    output is not projected. See :func:`mmvssm.ops.linear_attention`.

    Args:
        channels: C, a multiple of 4 for the rotation.
        heads: Number of heads.
        rope: Rotate queries and keys by their position. The frequencies run over the
            channels of all heads, so the first half of the heads depends on rows only,
            the second half on columns only.
        lepe: Add a depthwise convolution of the values.
        normalise: See the op.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        rope: bool = True,
        lepe: bool = True,
        normalise: bool = True,
    ):
        super().__init__()
        if heads < 1 or channels % heads or rope and channels // heads % 2:
            raise ValueError(
                f'heads must divide the {channels} channels into an even number '
                f'each, got {heads}'
            )
        if rope and channels % 4:
            raise ValueError(
                f'the rotation needs a multiple of 4 channels, got {channels}'
            )
        self.heads = heads
        self.rope = rope
        self.normalise = normalise
        self.qk = Linear(channels, 2 * channels)
        self.lepe = DepthwiseConv2d(channels) if lepe else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) -> map (B, C, H, W), fast in channels-last memory."""
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        q, k = self.qk(tokens).chunk(2, dim=-1)
        rotary = None
        if self.rope:
            rotary = rotary_tables(*x.shape[2:], x.shape[1], like=x).unbind()
        y = linear_attention(q, k, tokens, self.heads, rotary, normalise=self.normalise)
        y = y.to(x.dtype).mT.unflatten(2, x.shape[2:])
        return y if self.lepe is None else y + self.lepe(x)

    def extra_repr(self) -> str:
        return f'heads={self.heads}, rope={self.rope}, normalise={self.normalise}'
