"""The order of images in an epoch."""

from collections.abc import Sized
from typing import Any

from mmpretrain.datasets import RepeatAugSampler

from mmvssm.engine.errors import UsageError

_MULTIPLE = 256


class DeiTRepeatAugSampler(RepeatAugSampler):
    """MMPretrain's repeated augmentation, with DeiT's length of an epoch.

    With three repeats the epoch of ImageNet-1K has each third image three times, on
    different processes. DeiT's sampler takes the number of images down to a multiple of
    256 first, so a process gets ``len(dataset) // 256 * 256 // world_size``.

    Args:
        dataset: At least 256 images.
        **kwargs: Of ``RepeatAugSampler``.

    Raises:
        UsageError: There are fewer images.
    """

    def __init__(self, dataset: Sized, **kwargs: Any):
        super().__init__(dataset, **kwargs)
        if len(dataset) < _MULTIPLE:
            raise UsageError(
                f'DeiTRepeatAugSampler takes a multiple of {_MULTIPLE} images, and '
                f'train_dataloader has {len(dataset)}: set train_dataloader.sampler.'
                'type=DefaultSampler.'
            )
        images = len(dataset) // _MULTIPLE * _MULTIPLE
        self.num_selected_samples = images // self.world_size
