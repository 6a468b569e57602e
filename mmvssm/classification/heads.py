"""The heads of the published classifiers, for MMPretrain's ``ImageClassifier``.

Each is a ``ClsHead`` of MMPretrain, so losses, predictions and accuracies are its own.
The layers are those of :mod:`mmvssm.heads`. They are in the attribute ``classifier``,
by whose name :func:`mmvssm.load_checkpoint` knows them: published files load into such
a classifier, and what it was trained to loads into the models of this package, without
conversion.
"""

from typing import Any

from mmpretrain.models.heads import ClsHead
from torch import Tensor, nn

from mmvssm.heads import ClassificationHead, ClassTokenHead, RegisterHead


class _PublishedHead(ClsHead):
    """A head of this package behind the methods of MMPretrain's.

    Args:
        classifier: From the last output of the backbone to logits.
        in_channels, num_classes, **kwargs: See :class:`PooledClsHead`.
    """

    def __init__(
        self, classifier: nn.Module, in_channels: int, num_classes: int, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.classifier = classifier

    def pre_logits(self, feats: tuple) -> Tensor:
        """Outputs of the backbone -> the input of the last linear layer (B, F)."""
        return self.classifier.pre_logits(self.last(feats))

    def forward(self, feats: tuple) -> Tensor:
        """Outputs of the backbone -> logits (B, num_classes)."""
        return self.classifier(self.last(feats))

    def last(self, feats: tuple) -> Any:
        """The last output of the backbone, if it is of the right form."""
        raise NotImplementedError


class PooledClsHead(_PublishedHead):
    """Layer norm, mean over the map, linear layer: the head of VMamba and MLLA.

    The norm belongs to the head, so the backbone needs ``out_norm=False``, and
    ``out_indices=(3,)`` as a classifier uses its last map alone.

    Args:
        in_channels: Channels of the last map, such as 768.
        num_classes: Number of classes.
        **kwargs: ``loss``, ``topk``, ``cal_acc`` and ``init_cfg`` of MMPretrain's
            ``ClsHead``.

    Example:
        >>> model = dict(
        ...     type='mmpretrain.ImageClassifier',
        ...     backbone=dict(type='mmvssm.VSSM', arch='t_s1l8', out_indices=(3,),
        ...                   out_norm=False),
        ...     head=dict(type='mmvssm.PooledClsHead', in_channels=768,
        ...               num_classes=1000, loss=dict(type='LabelSmoothLoss',
        ...               label_smooth_val=0.1, mode='original')))
    """

    def __init__(self, in_channels: int, num_classes: int, **kwargs: Any):
        classifier = ClassificationHead(in_channels, num_classes)
        super().__init__(classifier, in_channels, num_classes, **kwargs)

    def last(self, feats: tuple) -> Tensor:
        """The last map (B, C, H, W)."""
        return _checked_map(feats[-1], type(self).__name__)


class _TokensClsHead(_PublishedHead):
    def last(self, feats: tuple) -> tuple[Tensor, Tensor]:
        """The last map (B, C, H, W) and the tokens (B, n, C)."""
        pair = feats[-1]
        if not isinstance(pair, tuple):
            raise ValueError(
                f'{type(self).__name__} takes pairs of a map and its tokens: build the '
                'backbone with classification=True'
            )
        return pair


class ClassTokenClsHead(_TokensClsHead):
    """A linear layer on the class token, or the mean of several: the head of Vim.

    The backbone needs ``classification=True`` and, as published,
    ``cls_token='middle'``. Without a class token the patches are pooled.

    Args:
        in_channels: Channels of the tokens, such as 192.
        num_classes, **kwargs: See :class:`PooledClsHead`.
        pooling: Of the patches: see :class:`mmvssm.heads.ClassTokenHead`.
    """

    def __init__(
        self, in_channels: int, num_classes: int, pooling: str = 'mean', **kwargs: Any
    ):
        classifier = ClassTokenHead(in_channels, num_classes, pooling=pooling)
        super().__init__(classifier, in_channels, num_classes, **kwargs)


class RegisterClsHead(_TokensClsHead):
    """All registers side by side, each reduced: the head of Mamba®.

    The backbone needs ``classification=True``.

    Args:
        in_channels: Channels of the registers, such as 384.
        num_classes, **kwargs: See :class:`PooledClsHead`.
        num_registers, reduce, pooling, widen: See :class:`mmvssm.heads.RegisterHead`.
            Published: 12 registers and ``reduce`` 1, 2 and 4 of the tiny, small and
            base model, 16 and 8 of the large one.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        num_registers: int = 12,
        reduce: int = 1,
        pooling: str = 'concat',
        widen: int = 1,
        **kwargs: Any,
    ):
        classifier = RegisterHead(
            in_channels, num_classes, num_registers, reduce, pooling, widen=widen
        )
        super().__init__(classifier, in_channels, num_classes, **kwargs)


def _checked_map(x: Any, name: str) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim != 4:
        raise ValueError(
            f'{name} takes maps (B, C, H, W): of VSSM and MLLA as they are, of others '
            "with out_type='featmap'; for their tokens take ClassTokenClsHead or "
            'RegisterClsHead'
        )
    return x
