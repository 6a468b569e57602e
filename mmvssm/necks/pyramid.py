"""Maps of several sizes from the maps of a plain backbone."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import nn

from mmvssm.registry import MODELS


@MODELS.register_module()
class PlainPyramid(BaseModule):
    """Four maps at 4, 2, 1 and 1/2 times the size of those that come in.

    Args:
        channels: C of all maps, in and out.
        learned: Enlarge by transposed convolutions, as the published
            segmentation models of Vim do inside the backbone; the names of
            parameters are then those of mmseg's ``Feature2Pyramid``. Otherwise
            by bilinear interpolation, without parameters. The last map is
            always pooled by maximum.
        init_cfg: mmengine's initialisation config.

    Note:
        The norm is a BatchNorm2d. ``sync_bn='torch'`` in a config of mmengine's
        runner turns it into the published SyncBatchNorm.
    """

    def __init__(
        self,
        channels: int,
        learned: bool = True,
        init_cfg: dict | list[dict] | None = None,
    ):
        super().__init__(init_cfg)
        self.learned = learned
        if learned:
            self.upsample_4x = nn.Sequential(
                _twice(channels), nn.BatchNorm2d(channels), nn.GELU(), _twice(channels)
            )
            self.upsample_2x = nn.Sequential(_twice(channels))

    def forward(self, maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Resize maps (B, C, H, W).

        Args:
            maps: Four maps, one a scale, or a single one for all four scales.

        Returns:
            Maps of sizes (4 H, 4 W), (2 H, 2 W), (H, W) and that halved,
            rounded up.

        Raises:
            ValueError: There are neither four maps nor one.
        """
        if len(maps) not in (1, 4):
            raise ValueError(f'PlainPyramid takes four maps, or one, got {len(maps)}')
        if len(maps) == 1:
            maps = (maps[0],) * 4
        if self.learned:
            first, second = self.upsample_4x(maps[0]), self.upsample_2x(maps[1])
        else:
            first, second = _enlarge(maps[0], 4), _enlarge(maps[1], 2)
        # A map one patch high is kept, not pooled away.
        return first, second, maps[2], F.max_pool2d(maps[3], 2, ceil_mode=True)


def _twice(channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, channels, 2, stride=2)


def _enlarge(x: torch.Tensor, factor: int) -> torch.Tensor:
    return F.interpolate(x, scale_factor=factor, mode='bilinear', align_corners=False)
