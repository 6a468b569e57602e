"""The models of a study: from what ``--models`` names to a model that is ready."""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from mmvssm import zoo
from mmvssm.backbones import set_img_shapes
from mmvssm.builders import build_classifier, list_models
from mmvssm.checkpoints import load_checkpoint
from mmvssm.engine import (
    UsageError,
    is_classifier,
    is_detector,
    load_config,
    load_weights,
)
from mmvssm.engine.configs.images import image_channels
from mmvssm.engine.errors import require_file
from mmvssm.families import Family, families

_TIMM = 'timm:'
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Subject:
    """One entry of ``--models``. Nothing is built yet.

    Attributes:
        label: Name in pictures and tables, different for each subject.
        source: A name of :func:`mmvssm.list_models`, the path of a config, or
            ``timm:NAME``.
        checkpoint: A file, an address, or ``mmvssm://NAME``; None for random weights.
        cfg: The config, where ``source`` is one.
    """

    label: str
    source: str
    checkpoint: str | None = None
    cfg: Config | None = field(default=None, repr=False)

    @property
    def title(self) -> str:
        """The label, with a note if the weights are random."""
        return self.label if self.checkpoint else f'{self.label} (untrained)'

    def build(
        self, device: str = 'cpu', seed: int = 0, trained: bool = True
    ) -> 'StudyModel':
        """Build the model in eval mode.

        Args:
            device: Where it goes.
            seed: Of the random weights.
            trained: Whether to load the checkpoint, if there is one.

        Raises:
            UsageError, CheckpointError: It cannot be built, or the checkpoint does not
                fit it.
        """
        torch.manual_seed(seed)
        if self.cfg is not None:
            model = _from_config(self)
        elif self.source.startswith(_TIMM):
            model = _from_timm(self)
        else:
            net = build_classifier(self.source)
            model = StudyModel(self, net, net.backbone, 'classifier')
        if trained and self.checkpoint:
            _load(model, self.checkpoint)
        model.net.to(device).eval()
        return model


@dataclass
class StudyModel:
    """A model that a study looks at.

    Attributes:
        subject: Where it comes from.
        net: The whole model, in eval mode: a classifier (images to logits), or a
            segmentor or detector of mmseg or mmdet.
        backbone: Its backbone; ``net`` itself for a model of timm.
        task: ``'classifier'``, ``'segmentor'`` or ``'detector'``.
        mean, std: Of each channel, in units of 0 to 255, in the order of the channels
            of the model.
        bgr: Whether the model takes blue first.
        loaded_head: Whether the head of a classifier has weights of a checkpoint; None
            for other models and without a checkpoint.
    """

    subject: Subject
    net: nn.Module
    backbone: nn.Module
    task: str
    mean: Sequence[float] = _MEAN
    std: Sequence[float] = _STD
    bgr: bool = False
    loaded_head: bool | None = None

    @property
    def label(self) -> str:
        """See :class:`Subject`."""
        return self.subject.label

    @property
    def title(self) -> str:
        """See :class:`Subject`."""
        return self.subject.title

    @property
    def family(self) -> Family | None:
        """Record of the backbone's family; None for a model of another package."""
        kinds = {family.backbone: family for family in families()}
        for kind in type(self.backbone).__mro__:
            if kind in kinds:
                return kinds[kind]
        return None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.net.parameters()).device

    def prepare(self, pixels: np.ndarray) -> Tensor:
        """Normalise a picture as in the model's training.

        Args:
            pixels: RGB, uint8 (H, W, 3).

        Returns:
            Images (1, 3, H, W), float32, on the model's device.

        Raises:
            UsageError: The picture is smaller than the backbone takes.
        """
        height, width = pixels.shape[:2]
        least = getattr(self.backbone, 'min_size', 1)
        if min(height, width) < least:
            raise UsageError(
                f'{self.label} takes images of at least {least}x{least} pixels, and '
                f'--size is {height} {width}: give a larger one.'
            )
        if self.bgr:
            pixels = pixels[..., ::-1]
        scale = list(self.mean), list(self.std)
        values = torch.from_numpy(pixels.copy()).to(self.device)
        mean, std = (values.new_tensor(x, dtype=torch.float32) for x in scale)
        images = ((values.float() - mean) / std).permute(2, 0, 1)[None].contiguous()
        # For backbones with mask_padding: nothing of it is padding.
        set_img_shapes(images, [(height, width)])
        return images

    def require_head(self) -> None:
        """For studies of what a classifier predicts.

        Raises:
            UsageError: Its checkpoint has left the head as it was initialised.
        """
        if self.loaded_head is False:
            raise UsageError(
                f'{self.subject.checkpoint} has no head for {self.label}, or one of '
                'another number of classes: what it would predict is random. Give the '
                'checkpoint of the whole classifier, or its config.'
            )

    def describe(self) -> dict[str, Any]:
        """What the JSON of a study says of the model."""
        return dict(
            label=self.label,
            source=self.subject.source,
            checkpoint=self.subject.checkpoint,
            family=self.family.title if self.family else None,
            task=self.task,
            parameters=sum(p.numel() for p in self.net.parameters()),
        )


def parse_subjects(
    entries: Sequence[str], options: Sequence[str] | None = None
) -> list[Subject]:
    """Read ``--models``.

    Args:
        entries: ``NAME_OR_CONFIG`` or ``NAME_OR_CONFIG=CHECKPOINT`` each. ``zoo``
            stands for all classifiers whose accuracy was published, with random
            weights.
        options: ``--cfg-options`` for all configs.

    Raises:
        UsageError: A name, a config or a file does not exist.
    """
    names = [
        name
        for entry in entries
        for name in (_published() if entry == 'zoo' else [entry])
    ]
    found = [_parse(name, options) for name in names]
    counts = Counter(subject.label for subject in found)
    labels, taken = [], Counter()
    for subject in found:
        label = subject.label
        if counts[label] > 1 and subject.checkpoint:
            label = f'{label} {Path(subject.checkpoint).stem}'
        taken[label] += 1
        labels.append(label if taken[label] == 1 else f'{label} ({taken[label]})')
    return [
        Subject(label, subject.source, subject.checkpoint, subject.cfg)
        for label, subject in zip(labels, found)
    ]


def published_accuracy(name: str) -> float | None:
    """Top-1 accuracy on ImageNet at 224 of a model, None if none was published."""
    weights = zoo.TABLE.get(name)
    if weights is None or weights.kind != 'classifier':
        return None
    return weights.metrics.get('top-1')


def _published() -> list[str]:
    return [name for name in list_models() if published_accuracy(name) is not None]


def _parse(entry: str, options: Sequence[str] | None) -> Subject:
    source, _, checkpoint = entry.partition('=')
    if Path(entry).is_file():
        source, checkpoint = entry, ''
    if checkpoint and not Path(checkpoint).is_file() and checkpoint in zoo.TABLE:
        checkpoint = f'{zoo.SCHEME}{checkpoint}'
    checkpoint = checkpoint or None
    if checkpoint:
        require_file(checkpoint, 'checkpoint')
    if source.endswith('.py'):
        cfg = load_config(source, options)
        if image_channels(cfg) != 3:
            raise UsageError(
                f'{source} takes images of {image_channels(cfg)} channels; the studies '
                'read images of 3 channels: leave it out.'
            )
        return Subject(Path(source.split('::')[-1]).stem, source, checkpoint, cfg)
    if source.startswith(_TIMM):
        if find_spec('timm') is None:
            raise UsageError(f'{source} needs timm: run `pip install timm`.')
        return Subject(source.removeprefix(_TIMM), source, checkpoint)
    if source not in list_models():
        raise UsageError(
            f'{source} is neither a config (NAME.py), nor timm:NAME, nor one of '
            f'{", ".join(list_models())}.'
        )
    return Subject(source, source, checkpoint)


def _from_config(subject: Subject) -> StudyModel:
    cfg = subject.cfg
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    part = copy.deepcopy(cfg.model)
    if not isinstance(part.get('backbone'), dict):
        raise UsageError(f'{subject.source}: the model has no backbone to look at.')
    part['backbone'].pop('init_cfg', None)
    net = revert_sync_batchnorm(MODELS.build(part))
    task = 'segmentor'
    if is_detector(cfg):
        task = 'detector'
    elif is_classifier(cfg):
        task = 'classifier'
    given = part.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    scale = {}
    if given.get('mean') is not None:
        scale = dict(mean=_triple(given['mean']), std=_triple(given['std']))
    swaps = any(given.get(key) for key in ('bgr_to_rgb', 'to_rgb'))
    # The toolboxes load images with blue first.
    return StudyModel(subject, net, net.backbone, task, bgr=not swaps, **scale)


def _triple(values: Sequence[float]) -> list[float]:
    return list(values) * 3 if len(values) == 1 else list(values)


def _from_timm(subject: Subject) -> StudyModel:
    import timm

    name = subject.source.removeprefix(_TIMM)
    if not timm.is_model(name):
        raise UsageError(f'timm has no model {name}: timm.list_models() lists all.')
    try:
        net = timm.create_model(name, dynamic_img_size=True)
    except TypeError:  # Not a plain vision transformer.
        net = timm.create_model(name)
    cfg = net.pretrained_cfg
    mean, std = ([255 * x for x in cfg[key]] for key in ('mean', 'std'))
    return StudyModel(subject, net, net, 'classifier', mean, std)


def _load(model: StudyModel, checkpoint: str) -> None:
    if model.family is None:
        load = _load_timm if model.subject.cfg is None else load_weights
        load(model.net, checkpoint)
    elif model.task != 'classifier':
        load_weights(model.net, checkpoint)
    else:
        report = load_checkpoint(model.net, checkpoint)
        print_log(str(report), 'current')
        model.loaded_head = all(name.startswith('backbone.') for name in report.missing)
    for name, value in model.net.state_dict().items():
        if not value.isfinite().all():
            raise UsageError(
                f'{checkpoint} holds NaN or infinite weights, such as {name}: a '
                'training that diverged leaves such a file; take an earlier one.'
            )


def _load_timm(net: nn.Module, checkpoint: str) -> None:
    from timm.models import load_checkpoint as load

    try:
        load(net, checkpoint, weights_only=True)
    except (RuntimeError, KeyError, ValueError) as error:
        raise UsageError(
            f'{checkpoint} does not fit: {str(error).splitlines()[0]}'
        ) from error
