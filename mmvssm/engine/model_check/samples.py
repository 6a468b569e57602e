"""Data samples of images that nobody took."""

from typing import Any

import numpy as np
import torch
from mmengine.structures import InstanceData, PixelData

# Left, top, right, bottom, in parts of the image: small, larger, nearly all of it.
_BOXES = ((0.1, 0.2, 0.3, 0.4), (0.2, 0.3, 0.7, 0.8), (0.0, 0.0, 0.9, 0.95))


def segmentation_sample(size: tuple[int, int]) -> Any:
    """All pixels are of class 0."""
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=_metainfo(size))
    sample.gt_sem_seg = _pixels(size)
    # Of heads that learn edges.
    sample.gt_edge_map = _pixels(size)
    return sample


def classification_sample(size: tuple[int, int]) -> Any:
    """An image of class 0."""
    from mmpretrain.structures import DataSample

    return DataSample(metainfo=_metainfo(size)).set_gt_label(0)


def detection_sample(size: tuple[int, int], masks: bool = True) -> Any:
    """Three objects of class 0."""
    from mmdet.structures import DetDataSample

    sample = DetDataSample(metainfo=_metainfo(size))
    height, width = size
    boxes = np.array(_BOXES) * (width, height, width, height)
    sample.gt_instances = _instances(boxes, size, masks)
    sample.ignored_instances = _instances(boxes[:0], size, masks)
    sample.gt_sem_seg = PixelData(sem_seg=_pixels(size).data)
    return sample


def _instances(boxes: np.ndarray, size: tuple[int, int], masks: bool) -> InstanceData:
    from mmdet.structures.mask import BitmapMasks

    found = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32),
        labels=torch.zeros(len(boxes), dtype=torch.long),
    )
    if masks:
        pixels = np.zeros((len(boxes), *size), np.uint8)
        for mask, (left, top, right, bottom) in zip(pixels, boxes.round().astype(int)):
            mask[top:bottom, left:right] = 1
        found.masks = BitmapMasks(pixels, *size)
    return found


def _metainfo(size: tuple[int, int]) -> dict:
    shapes = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
    return dict(
        **dict.fromkeys(shapes, size),
        scale_factor=(1.0, 1.0),
        flip=False,
        flip_direction=None,
        img_path='',
        img_id=0,
    )


def _pixels(size: tuple[int, int]) -> PixelData:
    return PixelData(data=torch.zeros(1, *size, dtype=torch.long))
