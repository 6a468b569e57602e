"""Load a checkpoint into a model, and report what was loaded."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from mmvssm.checkpoints.canonical import (
    Checkpoint,
    read_named,
    split_keys,
    summarise,
    to_canonical,
)
from mmvssm.errors import CheckpointError
from mmvssm.families import recognise

_OUTPUT_NORM = re.compile(r'(^|backbone\.|module\.)(out)?norm\d+\.')


@dataclass
class LoadReport:
    """Report of :func:`load_checkpoint`; ``print`` it.

    Attributes:
        family: Family of the file and the model, such as ``'VMamba'``.
        format: Form of the names in the file, such as ``'v2'``.
        contents: ``'classifier'``, ``'backbone'``, ``'segmentor'``,
            ``'detector'``, or ``'model'`` with heads of other names.
        arch: Name of the model that the file belongs to, such as ``'vmamba_t_s1l8'``.
        matched: Names in the model that were loaded.
        missing: Names in the model that the file does not have. Their values do not
            change.
        unexpected: Names in the converted file that the model does not have.
        notes: Changes that were made to fit the model, such as a resized position
            embedding.
    """

    family: str
    format: str
    contents: str
    arch: str
    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        total = len(self.matched) + len(self.missing)
        lines = [
            f'{self.family} {self.contents} checkpoint in {self.format} '
            f'format ({self.arch}): loaded {len(self.matched)} of the '
            f"model's {total} tensors"
        ]
        lines += [f'  {note}' for note in self.notes]
        if self.missing:
            lines.append('  not in the file, not changed: ' + summarise(self.missing))
            if self.contents == 'classifier' and any(
                map(_OUTPUT_NORM.search, self.missing)
            ):
                lines.append(
                    '  (classification files have no output norms: that is expected)'
                )
        if self.unexpected:
            lines.append('  only in the file, not used: ' + summarise(self.unexpected))
        return '\n'.join(lines)


def load_checkpoint(
    model: nn.Module, source: str | Path | Mapping, *, prefix: str | None = None
) -> LoadReport:
    """Load published or own weights into a model.

    The keys tell the family and the format of the file, and are converted. Model and
    file may each be a backbone, a classifier, or a whole segmentor or detector with a
    ``backbone``. Heads of the file are loaded if the model has them. No code in the
    file is run (``weights_only``).

    Args:
        model: The model, bare or wrapped (DDP ...).
        source: A ``.pth`` or ``.safetensors`` file, an http(s) address of one,
            or a state dict.
        prefix: Use only the keys of the file with this prefix. By default the place of
            the backbone follows from the keys.

    Returns:
        The names that matched, those that the file lacks, and those that only the file
        has.

    Raises:
        CheckpointError: The file is missing, cannot be read, or belongs to another
            family or another arch. The model is then unchanged.
    """
    target = model.state_dict()
    owner = recognise(target, f'the model {type(model).__name__}')
    state, what = read_named(source, prefix)
    family = recognise(state, what).family
    if family is not owner.family:
        raise CheckpointError(
            f'{what} holds {family.title} weights, but the model '
            f'{type(model).__name__} is {owner.family.title}'
        )
    checkpoint = to_canonical(state, what)
    backbone = model.get_submodule(owner.prefix.removesuffix('.'))
    checkpoint.backbone, notes = family.fit(checkpoint.backbone, backbone)

    own, foreign = split_keys(target, owner.prefix)
    names = {**foreign, **own}
    tensors = checkpoint.tensors
    matched = [key for key in names if key in tensors]
    missing = [key for key in names if key not in tensors]
    unexpected = [key for key in tensors if key not in names]
    wrong = {
        key: f'{key} is {_shape(tensors[key])} in the file and '
        f'{_shape(target[names[key]])} in the model'
        for key in matched
        if not fits(tensors[key], target[names[key]])
    }
    _check_arch(checkpoint, {key: target[own[key]] for key in own}, wrong, what)
    if wrong:
        raise CheckpointError(
            f'{what} has a head of another shape: {_first(wrong.values())}. '
            'Build the model with the number of classes of the file, or load into '
            'model.backbone to leave the head out'
        )
    model.load_state_dict({names[key]: tensors[key] for key in matched}, strict=False)
    return LoadReport(
        family.title,
        checkpoint.format,
        checkpoint.contents,
        checkpoint.arch,
        [names[key] for key in matched],
        [names[key] for key in missing],
        unexpected,
        notes,
    )


def fits(given: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether the shapes are equal, and both are floating-point or both are not."""
    same_kind = given.is_floating_point() == wanted.is_floating_point()
    return given.shape == wanted.shape and same_kind


def _check_arch(
    checkpoint: Checkpoint,
    model: Mapping[str, torch.Tensor],
    wrong: Mapping[str, str],
    what: str,
) -> None:
    """Refuse a file of another arch, which may share some names with this one.

    The file may have more stages than a model with few ``out_indices``.
    """
    family = checkpoint.family
    file = checkpoint.backbone
    built = {family.component(key) for key in model}
    problems = [wrong[key] for key in file if key in wrong]
    problems += [
        f'{key} is not in the file'
        for key in model
        if key not in file and family.component(key)
    ]
    problems += [
        f'{key} is not in the model'
        for key in file
        if key not in model and family.component(key) in built - {None}
    ]
    if problems:
        raise CheckpointError(
            f'{what} does not fit the model: the file looks like '
            f'{checkpoint.arch}, the model like {family.describe(model)}; '
            f'{_first(problems)}'
        )


def _shape(tensor: torch.Tensor) -> str:
    shape = 'x'.join(map(str, tensor.shape)) or 'a scalar'
    return shape if tensor.is_floating_point() else f'{shape} ({tensor.dtype})'


def _first(problems: Iterable[str], limit: int = 4) -> str:
    problems = list(problems)
    more = len(problems) - limit
    return '; '.join(problems[:limit]) + (f'; {more} more' if more > 0 else '')
