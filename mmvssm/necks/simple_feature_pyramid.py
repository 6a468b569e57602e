"""The simple feature pyramid of ViTDet (Li et al., 2022, arXiv 2203.16527)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import nn

from mmvssm.layers import LayerNorm2d
from mmvssm.registry import MODELS

# As in the published detectors; torch's default is 1e-5.
_EPS = 1e-6


class NormedConv(nn.Conv2d):
    """A convolution that keeps the size, without bias, and a norm over channels."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            padding=kernel_size // 2,
            bias=False,
        )
        self.norm = LayerNorm2d(out_channels, eps=_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(x))


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Maps for a detector from the single map of an isotropic backbone.

    Transposed convolutions and pooling make maps of 4, 2, 1 and 1/2 times its size.
    Each of these goes through a 1x1 and a 3x3 convolution with norms. Each further map
    takes every second row and column of the map before it. With a backbone of stride 16
    the strides are 4, 8, 16, 32, 64 ...

    Parameters have the published names, except that ``simfp_2`` to ``simfp_5`` are
    ``levels.0`` to ``levels.3``.

    Args:
        in_channels: C of the input map, a multiple of 4.
        out_channels: Channels of all output maps.
        num_outs: Number of output maps, at least 4.
        init_cfg: mmengine's initialisation config.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        num_outs: int = 5,
        init_cfg: dict | list[dict] | None = None,
    ):
        super().__init__(init_cfg)
        if in_channels % 4 or num_outs < 4:
            raise ValueError(
                f'SimpleFeaturePyramid needs in_channels divisible by 4, got '
                f'{in_channels}, and at least 4 num_outs, got {num_outs}'
            )
        self.num_outs = num_outs
        half, quarter = in_channels // 2, in_channels // 4
        resized = (
            (
                quarter,
                nn.ConvTranspose2d(in_channels, half, 2, stride=2),
                LayerNorm2d(half, eps=_EPS),
                nn.GELU(),
                nn.ConvTranspose2d(half, quarter, 2, stride=2),
            ),
            (half, nn.ConvTranspose2d(in_channels, half, 2, stride=2)),
            (in_channels,),
            # A map that is one patch high must not disappear in the pooling.
            (in_channels, nn.MaxPool2d(2, ceil_mode=True)),
        )
        self.levels = nn.ModuleList(
            nn.Sequential(
                *layers,
                NormedConv(channels, out_channels, 1),
                NormedConv(out_channels, out_channels, 3),
            )
            for channels, *layers in resized
        )

    def forward(self, maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Make the pyramid.

        Args:
            maps: One map (B, C, H, W).

        Returns:
            ``num_outs`` maps of ``out_channels`` channels, from (4 H, 4 W) down,
            contiguous.

        Raises:
            ValueError: There is more than one map, or none.
        """
        if len(maps) != 1:
            raise ValueError(
                f'SimpleFeaturePyramid takes one map, got {len(maps)}; set '
                f'out_indices of the backbone to its last block'
            )
        # The compiled ops of mmcv need NCHW strides.
        outs = [level(maps[0]).contiguous() for level in self.levels]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return tuple(outs)
