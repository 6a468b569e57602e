"""A classifier that learns from the average of its own weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from mmpretrain.models import ImageClassifier
from torch import Tensor, nn
from torch.nn import functional as F

from mmvssm.engine.errors import UsageError


class MESAClassifier(ImageClassifier):
    r"""MMPretrain's ``ImageClassifier`` with the loss of MESA, as MLLA is trained.

    From the epoch ``begin`` on the loss is

    .. math::
        CE(f(x), y) + ratio \cdot CE(f(x), softmax(\bar f(x))),

    where x and y are the mixed images and labels, f is this model, and
    :math:`\bar f`, without gradient and in eval mode, has the average of its weights
    (Du et al., "Sharpness-aware training for free", arXiv 2205.14083). The first term
    is the loss of the head. The second is reported as ``loss_mesa``.

    The average is that of :class:`mmvssm.engine.TimmEMAHook`, which must be among the
    ``custom_hooks``.

    Args:
        ratio: Weight of the second term.
        begin: First epoch, from 0, with the second term.
        args, kwargs: Of ``ImageClassifier``.

    Raises:
        UsageError: ``ratio`` or ``begin`` is negative.
    """

    def __init__(self, *args: Any, ratio: float = 1.0, begin: int = 75, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not (ratio > 0 and begin >= 0):
            raise UsageError(
                f'MESAClassifier takes a ratio above 0 and a begin of 0 or more, not '
                f'ratio={ratio}, begin={begin}.'
            )
        self.ratio, self.begin = ratio, begin
        self.has_hook = False
        # Not a module of this one: it has no part in its parameters and its state.
        self.teacher: Callable[[Tensor], Tensor] | None = None

    def teach(self, average: nn.Module, epoch: int) -> None:
        """Get the averaged model before an epoch, counted from 0."""
        self.has_hook = True
        self.teacher = partial(average, mode='tensor') if epoch >= self.begin else None

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """Losses of a batch of images (B, 3, H, W).

        Raises:
            UsageError: No hook keeps the average.
        """
        if not self.has_hook:
            raise UsageError(
                'MESAClassifier learns from the average of its weights: add '
                "dict(type='mmvssm.TimmEMAHook', decay=...) to custom_hooks."
            )
        features = self.extract_feat(inputs)
        losses = self.head.loss(features, data_samples)
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(inputs).float().softmax(1)
            loss = F.cross_entropy(self.head(features).float(), taught)
            losses['loss_mesa'] = self.ratio * loss
        return losses
