"""A data preprocessor for mmdet's detectors that says which part of a batch is image.

This file can be imported without mmdet; only building the preprocessor needs it.
"""

from functools import cache
from typing import Any

from torch import nn

from mmvssm.backbones.padding import set_img_shapes
from mmvssm.compat import why_no_detection
from mmvssm.registry import MODELS


@MODELS.register_module(name='DetDataPreprocessor')
def det_data_preprocessor(**options: Any) -> nn.Module:
    """Build mmdet's ``DetDataPreprocessor``, for backbones with ``mask_padding``.

    Its batches tell the backbone the ``img_shape`` of each image, from the data
    samples. Padding that the pipeline adds before, by ``Pad`` for example, is part
    of that size, and so of the image. All else is as in mmdet.

    Args:
        **options: Of mmdet's class.

    Raises:
        ImportError: There is no mmdet here.
    """
    if reason := why_no_detection():
        raise ImportError(
            f'mmvssm.DetDataPreprocessor is for detectors of mmdet, and there is '
            f'{reason}: run `make install-det`, or install onedl-mmdetection and '
            f'onedl-mmcv (not mmcv-lite).'
        )
    return _preprocessor()(**options)


@cache
def _preprocessor() -> type[nn.Module]:
    from mmdet.models import DetDataPreprocessor as Published

    class DetDataPreprocessor(Published):
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
