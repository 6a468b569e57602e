"""Maps of several sizes from the maps of an isotropic backbone."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import nn

from mmvssm.registry import MODELS

_SCALES = (4, 2, 1, 0.5, 0.25)


@MODELS.register_module()
class PlainPyramid(BaseModule):
    """Resize the maps of an isotropic backbone to several scales.

    Args:
        channels: C of all input and output maps.
        learned: Enlarge maps by transposed convolutions, as the published segmentation
            models of Vim do inside the backbone. The names of parameters are then those
            of mmseg's ``Feature2Pyramid``. If False, maps are enlarged by bilinear
            interpolation, without parameters. Maps are always reduced by maximum
            pooling.
        scales: Scales of the output maps: 4, 2, 1, 0.5 or 0.25, each at most once. With
            patches of 16 pixels the default gives strides of 4 to 32 pixels. With
            patches of 8, ``(2, 1, 0.5, 0.25)`` gives the same strides.
        init_cfg: mmengine's initialisation config.

    Raises:
        ValueError: A scale has another value, or is there twice.

    Note:
        The norm is a BatchNorm2d. ``sync_bn='torch'`` in a config of mmengine's
        runner turns it into the published SyncBatchNorm.
    """

    def __init__(
        self,
        channels: int,
        learned: bool = True,
        scales: Sequence[float] = (4, 2, 1, 0.5),
        init_cfg: dict | list[dict] | None = None,
    ):
        super().__init__(init_cfg)
        if not set(scales) <= set(_SCALES) or len(set(scales)) < len(scales):
            raise ValueError(f'scales must be some of {_SCALES}, got {scales}')
        self.learned = learned
        self.scales = tuple(scales)
        if learned and 4 in scales:
            self.upsample_4x = nn.Sequential(
                _twice(channels), nn.BatchNorm2d(channels), nn.GELU(), _twice(channels)
            )
        if learned and 2 in scales:
            self.upsample_2x = nn.Sequential(_twice(channels))

    def forward(self, maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Resize maps (B, C, H, W).

        Args:
            maps: One map for each scale, or a single map for all scales.

        Returns:
            Maps of size scale times (H, W), rounded up.

        Raises:
            ValueError: The number of maps is neither one nor the number of scales.
        """
        if len(maps) not in (1, len(self.scales)):
            raise ValueError(
                f'PlainPyramid takes {len(self.scales)} maps, or one, got {len(maps)}'
            )
        if len(maps) == 1:
            maps = (maps[0],) * len(self.scales)
        return tuple(map(self._resize, maps, self.scales))

    def _resize(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        if scale == 1:
            return x
        if scale < 1:
            # A map that is one patch high must not disappear in the pooling.
            return F.max_pool2d(x, round(1 / scale), ceil_mode=True)
        if self.learned:
            return getattr(self, f'upsample_{scale}x')(x)
        return F.interpolate(
            x, scale_factor=scale, mode='bilinear', align_corners=False
        )


def _twice(channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, channels, 2, stride=2)
