"""Convert the keys of a published or own checkpoint to one form."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from mmvssm.checkpoints.read import Weights, read_weights
from mmvssm.errors import CheckpointError
from mmvssm.families import Family, recognise

# Names in a family's record for parts outside the backbone.
_OTHER_PARTS = ('classifier.', 'neck.')
# In a classifier of MMPretrain the head is behind another name.
_MMPRETRAIN_HEAD = 'head.classifier.'
_SEGMENTOR_HEADS = ('decode_head.', 'auxiliary_head.')
_DETECTOR_HEADS = (
    *('rpn_head.', 'roi_head.', 'bbox_head.', 'mask_head.'),
    # The names of detectron2, whose heads are not converted.
    *('proposal_generator.', 'roi_heads.'),
)
# In detectron2 the pyramid contains the backbone.
_DETECTRON2_PYRAMID = re.compile(r'backbone\.simfp_([2-5])\.')


@dataclass
class Checkpoint:
    """A checkpoint in the canonical form.

    Attributes:
        family: The record of its family.
        format: Published form of its names: ``'v0-old'``, ``'v0-new'`` or ``'v2'`` for
            VMamba, ``'vim'``, ``'vim-fpn'``, ``'vim-detectron2'``; for other families
            their ``name``.
        contents: ``'classifier'``, ``'backbone'``, ``'segmentor'``,
            ``'detector'``, or ``'model'`` with heads of other names.
        arch: Name of the model with these shapes, such as ``'vmamba_t_s1l8'``.
        backbone: ``{name: tensor}`` with the backbone's own names.
        others: ``{name: tensor}`` of classifier, heads and necks.
        renamed: Number of names that the conversion changed.
        grids: Rows and columns of position embeddings, by the name of the module in
            the backbone, as far as the file says so.
    """

    family: Family
    format: str
    contents: str
    arch: str
    backbone: dict[str, torch.Tensor]
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    renamed: int = 0
    grids: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, the backbone's without prefix."""
        return {**self.backbone, **self.others}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Names to write to a file.

        The backbone of a whole model gets the prefix ``backbone.`` that
        mmengine's runner expects; a backbone or classifier file keeps the
        current published names.
        """
        if self.contents in ('backbone', 'classifier'):
            return self.tensors
        backbone = {f'backbone.{k}': v for k, v in self.backbone.items()}
        return {**backbone, **self.others}

    def __str__(self) -> str:
        return (
            f'{self.family.title} {self.contents} in {self.format} format, '
            f'{self.arch}: {len(self.backbone)} backbone tensors, '
            f'{len(self.others)} others'
            f'{summarise(self.others, ": ")}; {self.renamed} renamed'
        )


def convert(
    source: str | Path | Mapping,
    prefix: str | None = None,
    weights: str | None = None,
) -> Checkpoint:
    """Read a checkpoint, recognise and convert it.

    Args:
        source: A ``.pth`` or ``.safetensors`` file, an address or a name of the zoo
            (see :func:`mmvssm.load_checkpoint`), or a state dict.
        prefix: Use only the keys with this prefix. By default the place of the backbone
            follows from the keys.
        weights: ``'raw'`` or ``'ema'``, for a file with both.

    Raises:
        CheckpointError: The file is missing or cannot be read, or its keys belong to no
            known family.
    """
    return to_canonical(*read_named(source, prefix, weights))


def read_named(
    source: str | Path | Mapping,
    prefix: str | None = None,
    weights: str | None = None,
    maybe: bool = False,
) -> tuple[Weights, str]:
    """Read weights, and make a name for them for error messages.

    Args:
        source, prefix, weights: See :func:`convert`.
        maybe: Use all keys if none has the prefix.
    """
    what = 'the state dict' if isinstance(source, Mapping) else str(source)
    read = read_weights(source, weights)
    if prefix:
        behind = {
            key.removeprefix(prefix): value
            for key, value in read.tensors.items()
            if key.startswith(prefix)
        }
        if behind:
            grids = _behind(read.grids, prefix)
            return replace(read, tensors=behind, grids=grids), what
        if not maybe:
            raise CheckpointError(f"{what} has no keys with the prefix '{prefix}'")
    return read, what


def to_canonical(read: Weights, what: str) -> Checkpoint:
    """Recognise and convert a state dict; see :func:`convert`."""
    state = read.tensors
    found = recognise(state, what)
    family = found.family
    own, foreign = split_keys(state, found.prefix)
    changed = sum(family.rename(key) != key for key in own)
    pyramid = [key for key in foreign if _DETECTRON2_PYRAMID.match(key)]
    backbone = {}
    others = {_neck_name(key): state[full] for key, full in foreign.items()}
    for key, full in own.items():
        name = family.rename(key)
        target = others if name.startswith(_OTHER_PARTS) else backbone
        if name in target:
            raise CheckpointError(f'{what} has {name} twice, under different names')
        if not state[full].numel():
            raise CheckpointError(
                f'{what} is damaged: {full[:200]} is a tensor without numbers, of '
                f'shape {tuple(state[full].shape)}'
            )
        target[name] = family.reshape(name, state[full])
    return Checkpoint(
        family,
        family.format_of(own) + ('-detectron2' if pyramid else ''),
        _contents(others, whole=bool(foreign)),
        family.describe(backbone),
        backbone,
        others,
        changed + len(pyramid),
        _behind(read.grids, found.prefix),
    )


def _behind(
    grids: Mapping[str, tuple[int, int]], prefix: str
) -> dict[str, tuple[int, int]]:
    """Those of the module that a prefix stands for, and of its parts."""
    return {
        f'{name}.'.removeprefix(prefix).removesuffix('.'): grid
        for name, grid in grids.items()
        if f'{name}.'.startswith(prefix) or not prefix
    }


def _neck_name(key: str) -> str:
    return _DETECTRON2_PYRAMID.sub(lambda m: f'neck.levels.{int(m[1]) - 2}.', key)


def split_keys(
    keys: Iterable[str], prefix: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Split names into those of the backbone and others, as ``{short: full}``.

    ``'module.backbone.layers...'`` with the prefix ``'module.backbone.'``
    gives ``'layers...'``; then ``'module.decode_head...'`` beside it gives
    ``'decode_head...'``. In files of detectron2 the prefix is ``'backbone.net.'``. The
    head of a classifier of MMPretrain, ``'head.classifier...'``, gives
    ``'classifier...'``.
    """
    outer = prefix.removesuffix('net.').removesuffix('backbone.')
    own, foreign = {}, {}
    for key in keys:
        if key.startswith(prefix):
            own[key.removeprefix(prefix)] = key
        else:
            short = key.removeprefix(outer)
            if short.startswith(_MMPRETRAIN_HEAD):
                short = short.removeprefix('head.')
            foreign[short] = key
    return own, foreign


def mmpretrain_name(key: str) -> str:
    """Name in a classifier of MMPretrain of what is outside of the backbone."""
    return f'head.{key}' if key.startswith('classifier.') else key


def _contents(others: Iterable[str], whole: bool) -> str:
    others = list(others)
    for contents, heads in (
        ('segmentor', _SEGMENTOR_HEADS),
        ('detector', _DETECTOR_HEADS),
        ('classifier', ('classifier.',)),
    ):
        if any(key.startswith(heads) for key in others):
            return contents
    whole = whole or any(key.startswith('neck.') for key in others)
    return 'model' if whole else 'backbone'


def summarise(keys: Iterable[str], lead: str = '') -> str:
    """``'classifier.* (4), decode_head.* (30)'``, empty for no keys."""
    counts = Counter(key.split('.', 1)[0] for key in keys)
    text = ', '.join(f'{name}.* ({n})' for name, n in counts.items())
    return lead + text if text else ''
