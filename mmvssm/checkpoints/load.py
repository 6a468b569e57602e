"""Load a checkpoint into a model, and report what was loaded."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from mmvssm.checkpoints.adapt import adapt_stem, fresh_heads
from mmvssm.checkpoints.canonical import (
    Checkpoint,
    read_named,
    split_keys,
    summarise,
    to_canonical,
)
from mmvssm.errors import CheckpointError
from mmvssm.families import Family, models, recognise


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
        missing: Names in the model that were not loaded. Their values do not change.
        unexpected: Names in the converted file that the model does not have.
        notes: Changes that were made to fit the model, such as a resized position
            embedding, and assumptions about the file.
        copy: Key of the weights in the file, such as ``'model_ema'``; None if they
            are at its top.
        other_copies: Keys of further copies of the weights in the file.
        new_by_design: Those of ``missing`` that files of this kind never have, such
            as the output norms of a backbone.
    """

    family: str
    format: str
    contents: str
    arch: str
    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    notes: list[str] = field(default_factory=list)
    copy: str | None = None
    other_copies: tuple[str, ...] = ()
    new_by_design: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        total = len(self.matched) + len(self.missing)
        lines = [
            f'loaded {len(self.matched)} of {total} tensors of the model from a '
            f'{self.family} {self.contents} ({self.arch}, {self.format} format)'
        ]
        if self.copy or self.other_copies:
            also = ', '.join(self.other_copies)
            lines.append(
                f'  weights: {self.copy}'
                + (f'; the file also holds {also} (see weights=)' if also else '')
            )
        lines += [f'  {note}' for note in self.notes]
        if self.new_by_design:
            lines.append(
                '  new by design, as initialised: ' + summarise(self.new_by_design)
            )
        rest = [name for name in self.missing if name not in self.new_by_design]
        if rest:
            lines.append('  not loaded, as initialised: ' + summarise(rest))
        if self.unexpected:
            lines.append('  only in the file, not used: ' + summarise(self.unexpected))
        return '\n'.join(lines)


def load_checkpoint(
    model: nn.Module,
    source: str | Path | Mapping,
    *,
    prefix: str | None = None,
    weights: str | None = None,
    strict: bool = False,
    allow_nan: bool = False,
    other_heads: bool = False,
) -> LoadReport:
    """Load published or own weights into a model.

    The keys tell the family and the format of the file, and are converted. Model and
    file may each be a backbone, a classifier, or a whole segmentor or detector with a
    ``backbone``. Heads of the file are loaded if the model has them. No code in the
    file is run (``weights_only``).

    What differs in number of classes, image channels or image size is adapted, and
    the report says so: the last layer of a head stays as initialised, the filters of
    the stem are summed or repeated, position embeddings are resized.

    Args:
        model: The model, bare or wrapped (DDP ...).
        source: A ``.pth`` or ``.safetensors`` file, ``mmvssm://NAME`` of the zoo,
            ``hf://OWNER/REPOSITORY/FILE``, an http(s) address, or a state dict.
        prefix: Use only the keys of the file with this prefix; if a model has several
            backbones, fill the one with it. By default the place of the backbone
            follows from the keys.
        weights: The copy to use from a file with two, ``'raw'`` or averaged
            (``'ema'``). By default the one that the published figures belong to, or
            the raw one.
        strict: Refuse a file whose heads have another number of classes, or that
            lacks a tensor of the model other than those it cannot have.
        allow_nan: Load weights that are not finite.
        other_heads: Leave tensors of heads and necks that have another shape in the
            file as initialised, and say so, instead of refusing the file.

    Returns:
        The names that matched, those that the file lacks, and those that only the file
        has.

    Raises:
        CheckpointError: The file is missing, cannot be read, belongs to another family
            or another arch, or holds NaN. The model is then unchanged.
    """
    target = model.state_dict()
    owner = recognise(target, f'the model {type(model).__name__}', prefix)
    family = owner.family
    read, what = read_named(source, prefix, weights, maybe=owner.prefix == prefix)
    found = recognise(read.tensors, what).family
    if found is not family:
        raise CheckpointError(
            f'{what} holds {found.title} weights, but the model '
            f'{type(model).__name__} is {family.title}'
        )
    checkpoint = to_canonical(read, what)
    if not allow_nan:
        otherwise = ', or load it all the same with allow_nan=True'
        refuse_nan(checkpoint.tensors, what, otherwise)
    backbone = model.get_submodule(owner.prefix.removesuffix('.'))
    checkpoint.backbone, notes = family.fit(
        checkpoint.backbone, backbone, checkpoint.grids
    )

    own, foreign = split_keys(target, owner.prefix)
    names = {**foreign, **own}
    wanted = {key: target[name] for key, name in names.items()}
    notes = [*read.notes, *notes, *adapt_stem(checkpoint.backbone, wanted)]
    fresh, more = fresh_heads(checkpoint.others, wanted, what, strict)
    notes += more
    tensors = checkpoint.tensors
    matched = [key for key in names if key in tensors and key not in fresh]
    wrong = {
        key: f'{key} is {_shape(tensors[key])} in the file and '
        f'{_shape(wanted[key])} in the model'
        for key in matched
        if not fits(tensors[key], wanted[key])
    }
    _check_arch(checkpoint, {key: target[own[key]] for key in own}, wrong, what)
    if wrong and other_heads:
        notes.append(f'{_first(wrong.values())}: left as initialised')
        matched = [key for key in matched if key not in wrong]
    elif wrong:
        raise CheckpointError(
            f'{what} has a head of another shape: {_first(wrong.values())}. Load into '
            'model.backbone to leave the head out'
        )
    missing = [key for key in names if key not in matched]
    by_design = [key for key in missing if key in own and not family.component(key)]
    if strict and (lacking := [key for key in missing if key not in by_design]):
        raise CheckpointError(
            f'{what} lacks {len(lacking)} tensors of the model: {_first(lacking)}'
        )
    model.load_state_dict({names[key]: tensors[key] for key in matched}, strict=False)
    # For the model card.
    model.loaded_from = (*getattr(model, 'loaded_from', ()), what)
    return LoadReport(
        family.title,
        checkpoint.format,
        checkpoint.contents,
        checkpoint.arch,
        [names[key] for key in matched],
        [names[key] for key in missing],
        [key for key in tensors if key not in names],
        notes,
        read.copy,
        read.others,
        [names[key] for key in by_design],
    )


def fits(given: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether the shapes are equal, and both are floating-point or both are not."""
    same_kind = given.is_floating_point() == wanted.is_floating_point()
    return given.shape == wanted.shape and same_kind


def refuse_nan(
    tensors: Mapping[str, torch.Tensor], what: str, otherwise: str = ''
) -> None:
    """Raise :class:`CheckpointError` if a tensor is not finite, and name the first."""
    bad = [key for key, value in tensors.items() if not _is_finite(value)]
    if bad:
        raise CheckpointError(
            f'{what} holds NaN or infinite weights: {_first(bad)}. A training that '
            f'diverged leaves such a file; take an earlier one{otherwise}'
        )


def _is_finite(value: torch.Tensor) -> bool:
    # torch does not look for NaN in floats of 8 bits.
    small = value.is_floating_point() and value.dtype.itemsize == 1
    return bool((value.float() if small else value).isfinite().all())


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
            f'{checkpoint.arch}, the model like {family.describe(model)}'
            f'{_arch_to_set(family, checkpoint.arch)}; {_first(problems)}'
        )


def _arch_to_set(family: Family, arch: str) -> str:
    """What to write to get the model of the file, if it is a published one."""
    known = {name: short for name, other, short in models() if other is family}
    return f". Set arch='{known[arch]}' to load it" if arch in known else ''


def _shape(tensor: torch.Tensor) -> str:
    shape = 'x'.join(map(str, tensor.shape)) or 'a scalar'
    return shape if tensor.is_floating_point() else f'{shape} ({tensor.dtype})'


def _first(problems: Iterable[str], limit: int = 4) -> str:
    problems = list(problems)
    more = len(problems) - limit
    return '; '.join(problems[:limit]) + (f'; {more} more' if more > 0 else '')
