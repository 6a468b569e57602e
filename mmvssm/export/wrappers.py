"""What is exported of a model: a module from one image to named outputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvssm.backbones.base import Backbone
from mmvssm.export.errors import ExportError
from mmvssm.heads import ImageClassifier

TASKS = ('logits', 'maps', 'seg')
# Of ImageNet, in RGB: with these all classifiers of the zoo were trained.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Normalisation:
    """What a model wants done to an image of numbers from 0 to 255.

    Attributes:
        mean, std: One number a channel, or one for all, in the order of the model.
        bgr: Whether the first channel of the model is blue, not red.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    bgr: bool = False


class ImageModel(nn.Module):
    """From ``image`` (B, C, H, W) float32 to a tuple of tensors.

    Attributes:
        task: One of ``TASKS``.
        output_names: Names of what :meth:`forward` returns.
        channels: C.
        normalisation: What the images need before; of none if the graph has it.
        normalised_inside: Whether images are RGB of 0 to 255.
    """

    task: str
    output_names: tuple[str, ...]

    def __init__(
        self,
        model: nn.Module,
        channels: int,
        normalisation: Normalisation,
        normalise: bool = False,
    ):
        super().__init__()
        self.model = model
        self.channels = channels
        self.normalisation = normalisation
        self.normalised_inside = normalise
        if normalise:
            for name in ('mean', 'std'):
                numbers = torch.tensor(getattr(normalisation, name))
                self.register_buffer(name, numbers.view(-1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        if self.normalised_inside:
            if self.normalisation.bgr:
                image = image.flip(1)
            image = (image - self.mean) / self.std
        return self.outputs(image)

    def outputs(self, image: Tensor) -> tuple[Tensor, ...]:
        """What :meth:`forward` returns, of a normalised image."""
        raise NotImplementedError


class Classifier(ImageModel):
    """``logits`` (B, K)."""

    task = 'logits'
    output_names = ('logits',)

    def outputs(self, image: Tensor) -> tuple[Tensor, ...]:
        return (self.model(image),)


class Maps(ImageModel):
    """``map0``, ``map1`` ... of a backbone, with ``tokens0`` ... if it returns those.

    Args:
        model: A backbone.
        *others: See :class:`ImageModel`.
    """

    task = 'maps'

    def __init__(self, model: nn.Module, *others: Any):
        super().__init__(model, *others)
        kinds = (
            ('map', 'tokens') if getattr(model, 'return_tokens', False) else ('map',)
        )
        number = len(model.out_indices)
        self.output_names = tuple(
            f'{kind}{place}' for place in range(number) for kind in kinds
        )

    def outputs(self, image: Tensor) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for out in self.model(image):
            found.extend(out if isinstance(out, tuple) else (out,))
        return tuple(found)


class Segmentor(ImageModel):
    """``labels`` (B, H, W) int64 of a segmentor of mmseg, or its ``logits``.

    Logits (B, K, H, W) have the size of the image. Images that the data preprocessor
    pads in tests are padded here, and the padding is cut off again.

    Args:
        model: An ``EncoderDecoder`` of mmseg.
        channels, normalisation, normalise: See :class:`ImageModel`.
        task: ``'seg'`` or ``'logits'``.
    """

    def __init__(
        self,
        model: nn.Module,
        channels: int,
        normalisation: Normalisation,
        normalise: bool = False,
        task: str = 'seg',
    ):
        super().__init__(model, channels, normalisation, normalise)
        self.task = task
        self.output_names = ('labels',) if task == 'seg' else ('logits',)
        preprocessor = model.data_preprocessor
        padding = getattr(preprocessor, 'test_cfg', None) or {}
        self.padded_to = padding.get('size')
        self.divisor = padding.get('size_divisor') or 1
        self.pad_value = float(getattr(preprocessor, 'pad_val', 0))

    def outputs(self, image: Tensor) -> tuple[Tensor, ...]:
        logits = self._logits(image)
        return (logits if self.task == 'logits' else self.labels(logits),)

    def labels(self, logits: Tensor) -> Tensor:
        """(B, H, W) int64, of logits (B, K, H, W)."""
        if logits.shape[1] > 1:
            return logits.argmax(1)
        threshold = self.model.decode_head.threshold
        return (logits[:, 0].sigmoid() > threshold).long()

    def _logits(self, image: Tensor) -> Tensor:
        height, width = image.shape[2:]
        image = self._pad(image)
        size = image.shape[2:]
        meta = dict(ori_shape=size, img_shape=size, pad_shape=size)
        logits = self.model.encode_decode(image, [meta])
        if self.padded_to is not None or self.divisor > 1:
            logits = logits[:, :, :height, :width]
        return logits

    def _pad(self, image: Tensor) -> Tensor:
        """Pad at the bottom and right, as mmseg's ``stack_batch`` does."""
        if self.padded_to is not None:
            more = [
                torch.sym_max(least - size, 0)
                for least, size in zip(self.padded_to, image.shape[2:])
            ]
        elif self.divisor > 1:
            more = [
                -(-size // self.divisor) * self.divisor - size
                for size in image.shape[2:]
            ]
        else:
            return image
        return F.pad(image, (0, more[1], 0, more[0]), value=self.pad_value)


def wrap(
    model: nn.Module,
    task: str | None = None,
    normalise: bool = False,
    normalisation: Normalisation | None = None,
) -> ImageModel:
    """Choose what is exported of a model.

    Args:
        model: A classifier or backbone of this package, a segmentor of mmseg, or a
            classifier of MMPretrain, in eval mode. Any other module is taken for a
            classifier.
        task: One of ``TASKS``. None: ``'maps'`` of a backbone, ``'seg'`` of a
            segmentor, else ``'logits'``.
        normalise: Whether images shall be RGB of 0 to 255, and the graph normalises
            them.
        normalisation: What the model wants. None: as its data preprocessor says;
            without one, ImageNet's mean and standard deviation.

    Raises:
        ExportError: The model cannot be exported, or has no such outputs.
    """
    if task not in (None, *TASKS):
        raise ExportError(f'task must be one of {TASKS}, got {task!r}')
    if model.training:
        raise ExportError('the model is in training mode: call model.eval() before')
    refuse(model)
    segmentor = is_segmentor(model)
    normalisation = normalisation or normalisation_of(model)
    if segmentor and task == 'maps':
        model = model.backbone
        segmentor = False
    kind: type[ImageModel]
    options: dict[str, Any] = {}
    if segmentor:
        kind, default, options = Segmentor, 'seg', dict(task=task or 'seg')
        allowed: Sequence[str] = ('seg', 'logits')
    elif isinstance(model, Backbone):
        kind, default, allowed = Maps, 'maps', ('maps',)
    else:
        kind, default, allowed = Classifier, 'logits', ('logits',)
    if (task or default) not in allowed:
        raise ExportError(
            f'{type(model).__name__} has no {task}: its task is '
            f'{" or ".join(allowed)}; maps are of mmvssm.build_backbone(NAME) or of a '
            'segmentor, seg is of a segmentor'
        )
    channels = _channels(model)
    if normalise and len(normalisation.mean) not in (1, channels):
        raise ExportError(
            f'normalise: the model takes {channels} channels, and there are means for '
            f'{len(normalisation.mean)}: set mean and std of data_preprocessor, or '
            'normalise the images before'
        )
    return kind(model, channels, normalisation, normalise, **options).eval()


def is_segmentor(model: nn.Module) -> bool:
    """Whether a model is one of mmseg's kinds."""
    return any(
        kind.__name__ == 'BaseSegmentor' and kind.__module__.startswith('mmseg.')
        for kind in type(model).mro()
    )


def refuse(model: nn.Module) -> None:
    """Raise :class:`ExportError` for a model that cannot be exported."""
    kinds = {
        (kind.__module__.partition('.')[0], kind.__name__) for kind in type(model).mro()
    }
    if ('mmdet', 'BaseDetector') in kinds:
        raise ExportError(
            f'{type(model).__name__} is a detector, whose proposals and boxes are the '
            'domain of mmdeploy: export its backbone alone, '
            "mmvssm.export.to_onnx(model.backbone, FILE, task='maps')"
        )
    for module in model.modules():
        if getattr(module, 'mask_padding', False):
            raise ExportError(
                f'{type(module).__name__} has mask_padding=True, which runs the images '
                'of each size on their own: build it with mask_padding=False'
            )
    if not is_segmentor(model):
        return
    if ('mmseg', 'EncoderDecoder') not in kinds:
        raise ExportError(
            f'{type(model).__name__} is no EncoderDecoder of mmseg; it is not known '
            "how it predicts: export its backbone alone, task='maps'"
        )
    if (model.test_cfg or {}).get('mode', 'whole') != 'whole':
        raise ExportError(
            "the segmentor predicts by sliding windows (test_cfg.mode='slide'), and a "
            "graph takes whole images: set model.test_cfg.mode='whole'"
        )


def normalisation_of(model: nn.Module) -> Normalisation:
    """What the data preprocessor of a model does, else what ImageNet's models want."""
    preprocessor = getattr(model, 'data_preprocessor', None)
    if preprocessor is None:
        return Normalisation()
    if not getattr(preprocessor, '_enable_normalize', False):
        mean, std = (0.0,), (1.0,)
    else:
        mean = tuple(preprocessor.mean.flatten().tolist())
        std = tuple(preprocessor.std.flatten().tolist())
    # Images are loaded by OpenCV, blue first; of other than three channels all keep
    # the order of the file.
    names = ('_channel_conversion', 'to_rgb')  # The second is MMPretrain's.
    swaps = any(getattr(preprocessor, name, False) for name in names)
    bgr = not swaps and _channels(model) == 3
    return Normalisation(mean, std, bgr)


def _channels(model: nn.Module) -> int:
    """Those of the image."""
    backbone = getattr(model, 'backbone', model)
    channels = getattr(backbone, 'in_channels', None)
    if isinstance(channels, int):
        return channels
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return 3


def least_size(model: nn.Module) -> int:
    """Height and width of the smallest image that a model takes.

    Args:
        model: Any, or a module of this file.
    """
    if isinstance(model, ImageModel):
        model = model.model
    backbone = getattr(model, 'backbone', model)
    least = int(getattr(backbone, 'min_size', 1))
    # Maps that Feature2Pyramid pools must have a pixel left.
    rescales = getattr(getattr(model, 'neck', None), 'rescales', ())
    patches = round(1 / min(*rescales, 1)) if rescales else 1
    return least + (patches - 1) * int(getattr(backbone, 'stride', 1))


__all__ = [
    'Classifier',
    'ImageClassifier',
    'ImageModel',
    'Maps',
    'Normalisation',
    'Segmentor',
    'is_segmentor',
    'least_size',
    'normalisation_of',
    'refuse',
    'wrap',
]
