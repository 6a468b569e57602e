"""Data preprocessors of mmseg and mmdet, for images of any number of channels.

That of mmdet also says which part of a batch is image. This file can be imported
without mmseg and mmdet; only building a preprocessor needs them.
"""

from collections.abc import Sequence
from functools import cache
from numbers import Number
from typing import Any

import torch
from torch import nn

from mmvssm.backbones.padding import set_img_shapes
from mmvssm.compat import why_no_detection
from mmvssm.registry import MODELS


@MODELS.register_module(name='SegDataPreProcessor')
def seg_data_preprocessor(**options: Any) -> nn.Module:
    """Build mmseg's ``SegDataPreProcessor``, for images of any number of channels.

    ``mean`` and ``std`` have one number for each channel, in the order of the loaded
    image, or one for all channels. All else is as in mmseg.

    Args:
        **options: Of mmseg's class.

    Raises:
        ValueError: ``mean`` and ``std`` do not fit together, or ``bgr_to_rgb`` or
            ``rgb_to_bgr`` is set for other than 3 channels. When it is called: the
            images have another number of channels.
    """
    return _seg_preprocessor()(**options)


@MODELS.register_module(name='DetDataPreprocessor')
def det_data_preprocessor(**options: Any) -> nn.Module:
    """Build mmdet's ``DetDataPreprocessor``, for any channels and ``mask_padding``.

    ``mean`` and ``std`` are those of :func:`seg_data_preprocessor`. Batches tell a
    backbone with ``mask_padding`` the ``img_shape`` of each image, from the data
    samples. Padding that the pipeline adds before, by ``Pad`` for example, is part
    of that size, and so of the image. All else is as in mmdet.

    Args:
        **options: Of mmdet's class.

    Raises:
        ImportError: There is no mmdet here.
        ValueError: As of :func:`seg_data_preprocessor`.
    """
    if reason := why_no_detection():
        raise ImportError(
            f'mmvssm.DetDataPreprocessor is for detectors of mmdet, and there is '
            f'{reason}: run `make install-det`, or install onedl-mmdetection and '
            f'onedl-mmcv (not mmcv-lite).'
        )
    return _det_preprocessor()(**options)


def _numbers(name: str, value: Any) -> list[float] | None:
    """``mean`` or ``std`` as a list."""
    if value is None:
        return None
    values = [value] if isinstance(value, Number) else list(value)
    if not values or not all(isinstance(x, Number) for x in values):
        raise ValueError(
            f'{name} of data_preprocessor must have a number for each channel of the '
            f'image, got {value!r}'
        )
    return values


class _AnyChannels:
    """What precedes mmengine's ``ImgDataPreprocessor``, which takes 1 or 3 channels."""

    def __init__(
        self,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
        **options: Any,
    ):
        mean, std = _numbers('mean', mean), _numbers('std', std)
        number = len(mean or ())
        if number != len(std or ()):
            raise ValueError(
                f'mean and std of data_preprocessor need equally many numbers, one for '
                f'each channel of the image, got {mean} and {std}'
            )
        for name in ('bgr_to_rgb', 'rgb_to_bgr'):
            if options.get(name) and number not in (0, 1, 3):
                raise ValueError(
                    f'{name}=True of data_preprocessor swaps the channels of images '
                    f'with 3, and mean has {number} numbers: set it to False'
                )
        super().__init__(**options)
        if mean is not None:
            self._enable_normalize = True
            for name, values in (('mean', mean), ('std', std)):
                numbers = torch.tensor(values, dtype=torch.float32)
                self.register_buffer(name, numbers.view(-1, 1, 1), persistent=False)

    def forward(self, data: dict, training: bool = False) -> dict:
        expected = self.mean.shape[0] if self._enable_normalize else 1
        for image in data['inputs']:
            channels = image.shape[-3]
            if expected not in (1, channels):
                raise ValueError(
                    f'an image has {channels} channels, but mean and std of '
                    f'data_preprocessor have {expected} numbers: give them, and '
                    f'in_channels of the backbone, as many as the images have channels'
                )
            if self._channel_conversion and channels != 3:
                raise ValueError(
                    f'bgr_to_rgb or rgb_to_bgr of data_preprocessor swaps the channels '
                    f'of images with 3, and an image has {channels}: set it to False'
                )
        # Of 16-bit integers torch can do little more than this.
        data = dict(data, inputs=_as_float(data['inputs']))
        return super().forward(data, training)


def _as_float(images: Any) -> Any:
    if isinstance(images, torch.Tensor):
        return images if images.dtype == torch.uint8 else images.float()
    return [_as_float(image) for image in images]


@cache
def _seg_preprocessor() -> type[nn.Module]:
    from mmseg.models import SegDataPreProcessor as Published

    class SegDataPreProcessor(_AnyChannels, Published):
        pass

    return SegDataPreProcessor


@cache
def _det_preprocessor() -> type[nn.Module]:
    from mmdet.models import DetDataPreprocessor as Published

    class DetDataPreprocessor(_AnyChannels, Published):
        def forward(self, data: dict, training: bool = False) -> dict:
            # Before they are padded, for where nothing else tells the sizes.
            shapes = [tuple(image.shape[-2:]) for image in data['inputs']]
            data = super().forward(data, training)
            if data['data_samples'] is not None:
                # Batch augmentations change them.
                shapes = [
                    sample.metainfo.get('img_shape', shape)
                    for sample, shape in zip(data['data_samples'], shapes, strict=True)
                ]
            set_img_shapes(data['inputs'], shapes)
            return data

    return DetDataPreprocessor
