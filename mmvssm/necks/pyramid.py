"""Maps of several sizes from the maps of an isotropic backbone.

This file can be imported without mmseg; only building its ``Feature2Pyramid`` needs it.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

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


@MODELS.register_module(name='Feature2Pyramid')
def feature2pyramid(*args: Any, **options: Any) -> nn.Module:
    """Build mmseg's ``Feature2Pyramid`` that says which maps are too small for it.

    Its pooling drops rows and columns that do not fill a window, so a map must be as
    high and wide as the largest window: 2 patches for ``rescales=[4, 2, 1, 0.5]``, 4
    for ``[2, 1, 0.5, 0.25]``. :class:`PlainPyramid` takes maps of any size, and the
    same weights.

    Args:
        *args, **options: Of mmseg's class.

    Raises:
        ValueError: When it is called: a map is too small.
    """
    return _feature2pyramid()(*args, **options)


@cache
def _feature2pyramid() -> type[nn.Module]:
    from mmseg.models.necks import Feature2Pyramid as Published

    class Feature2Pyramid(Published):
        def forward(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            least = round(1 / min(*self.rescales, 1))
            height, width = inputs[0].shape[2:]
            if min(height, width) < least:
                raise ValueError(
                    f'Feature2Pyramid with rescales={list(self.rescales)} takes images '
                    f'of at least {least}x{least} patches, got {height}x{width}: '
                    f"resize the image, or set type='mmvssm.PlainPyramid', which takes "
                    f'any size'
                )
            return super().forward(inputs)

    return Feature2Pyramid
