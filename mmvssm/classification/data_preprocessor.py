"""What is done to whole batches of images and labels, as timm does it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from mmpretrain.models import ClsDataPreprocessor as _ClsDataPreprocessor
from mmpretrain.models import CutMix
from torch import Tensor

from mmvssm.engine.errors import UsageError

_ATTEMPTS = 10


class ClsDataPreprocessor(_ClsDataPreprocessor):
    """MMPretrain's preprocessor, with timm's erasing, mixup and CutMix in training.

    After normalisation, a box of an image is filled with noise, and then a batch is
    mixed. This differs from MMPretrain's ``RandomErasing``, which comes before
    normalisation and so has its noise cut at black and white, and from its ``Mixup``
    and ``CutMix``, which pair images at random: here image i of n is mixed with image
    n - 1 - i, so with an odd n the one in the middle stays as it is. Labels are
    smoothed by the head's loss, which is the same before and after mixing.

    Args:
        mixup: Both parameters of the Beta distribution of mixup's weight; 0 for none.
        cutmix: The same of CutMix. If both are given, each batch tosses a coin.
        erase: Probability for each image to have a box erased.
        args, kwargs: Of ``ClsDataPreprocessor``; ``num_classes`` is needed.

    Raises:
        UsageError: The model's ``train_cfg`` mixes batches, too, or an option is out
            of its range.
    """

    def __init__(
        self,
        *args: Any,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        erase: float = 0.0,
        batch_augments: dict | None = None,
        **kwargs: Any,
    ):
        for name, value in (('mixup', mixup), ('cutmix', cutmix), ('erase', erase)):
            most = 1 if name == 'erase' else math.inf
            if not isinstance(value, (int, float)) or not 0 <= value <= most:
                span = 'from 0 to 1' if most == 1 else 'of 0 or more'
                raise UsageError(
                    f'{name} of mmvssm.ClsDataPreprocessor must be a number {span}, '
                    f'not {value!r}.'
                )
        augments = [partial(_mixup, alpha=mixup)] if mixup else []
        augments += [partial(_cutmix, alpha=cutmix)] if cutmix else []
        if batch_augments and (augments or erase):
            raise UsageError(
                'mixup, cutmix and erase of mmvssm.ClsDataPreprocessor take the place '
                'of train_cfg.augments: leave out one of the two.'
            )
        if erase:
            augments = [
                partial(_erase_then, erase, after) for after in augments or [None]
            ]
        if augments:
            batch_augments = dict(augments=augments)
        super().__init__(*args, batch_augments=batch_augments, **kwargs)
        self.mixup, self.cutmix, self.erase = mixup, cutmix, erase


def _mixup(images: Tensor, scores: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    weight = np.random.beta(alpha, alpha)
    images = weight * images + (1 - weight) * images.flip(0)
    return images, _mix_scores(scores, weight)


def _cutmix(images: Tensor, scores: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    weight = np.random.beta(alpha, alpha)
    # Its boxes do not depend on its own parameter.
    box = CutMix(1.0).cutmix_bbox_and_lam(images.shape[-2:], weight)
    (top, bottom, left, right), weight = box
    images = images.clone()
    patch = images.flip(0)[..., top:bottom, left:right]
    images[..., top:bottom, left:right] = patch
    return images, _mix_scores(scores, weight)


def _mix_scores(scores: Tensor, weight: float) -> Tensor:
    scores = scores.float()
    return weight * scores + (1 - weight) * scores.flip(0)


def _erase_then(
    probability: float, after: Callable | None, images: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor]:
    images = images.clone()
    for image in images:
        if np.random.rand() < probability:
            erase_box(image)
    return (images, scores.float()) if after is None else after(images, scores)


def erase_box(
    image: Tensor,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> None:
    """Fill a box with normal noise (Zhong et al., arXiv 1708.04896), as timm does.

    Args:
        image: (C, H, W), normalised; changed in place.
        area: Range of the box's part of the image, drawn evenly.
        aspect: Range of height / width, drawn evenly on a logarithmic scale. A box
            that does not fit is drawn anew, ten times at most.
    """
    height, width = image.shape[-2:]
    for _ in range(_ATTEMPTS):
        pixels = np.random.uniform(*area) * height * width
        ratio = math.exp(np.random.uniform(*map(math.log, aspect)))
        rows, columns = (
            round(math.sqrt(pixels * ratio)),
            round(math.sqrt(pixels / ratio)),
        )
        if rows < height and columns < width:
            top = np.random.randint(height - rows + 1)
            left = np.random.randint(width - columns + 1)
            box = image[:, top : top + rows, left : left + columns]
            box.copy_(torch.randn_like(box))
            return
