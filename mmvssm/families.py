"""Families of models: one record each, in the file of its backbone.

Builders, checkpoints, layer decay and analysis read these records. Nothing else has
to know that a family exists.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mmvssm.errors import CheckpointError


def _same_name(key: str) -> str:
    return key


def _same_shape(key: str, value: Tensor) -> Tensor:
    return value


def _same_tensors(
    state: Mapping[str, Tensor],
    backbone: nn.Module,
    grids: Mapping[str, tuple[int, int]],
) -> tuple[dict[str, Tensor], list[str]]:
    return dict(state), []


@dataclass(frozen=True, kw_only=True)
class Family:
    """All that the package knows about one family of backbones.

    The names of parameters that these functions take and give have no prefix: they
    are those of the bare backbone. Names of the classification head start with
    ``classifier.``, those of a neck with ``neck.``.

    Attributes:
        name: First part of the names of its models: ``'vim'`` of ``'vim_t'``.
        title: What messages call it, such as ``'Vim'``.
        backbone: Its class. It takes the name of an arch, then keywords.
        archs: Arguments of each published arch, by the second part of the name.
        head: Makes the classification head, from the backbone, the name of the arch,
            the number of classes, and options as keywords.
        classifier_args: Arguments of the backbone when that head follows.
        signature: Pattern of a name that every model of the family has, and no model
            of another family.
        unless: Pattern of a name that says that it is another family after all.
        depth: Where a parameter stands on the way from the image to the maps: an
            empty tuple in the stem, the place of its block (such as stage and number)
            in a block, None behind all blocks. Layer decay goes by it.
        describe: Name of the model that shapes of a state dict belong to, such as
            ``'vim_t'``, or what they look like in words.
        component: Which part of the backbone a name belongs to that a file has as a
            whole or not at all. None for what a file may lack.
        target_layer: The module of a backbone whose output Grad-CAM takes: a map
            (B, C, H, W) or a sequence (B, L, C).
        file_format: What the naming of a file is called, by its names.
        rename: Published name -> own name.
        reshape: Own name and the tensor of a file -> the tensor as stored here.
        fit: Fits the tensors of a file to a model (position embeddings, class
            tokens), and gives notes on what it changed. The third argument has the
            grids (rows, columns) that the file says its position embeddings have, by
            the name of the module, ``''`` for the backbone itself. It raises
            :class:`mmvssm.errors.CheckpointError` where there is no way.
    """

    name: str
    title: str
    backbone: type[nn.Module]
    archs: Mapping[str, Mapping[str, Any]]
    head: Callable[..., nn.Module]
    signature: str
    depth: Callable[[str], tuple[int, ...] | None]
    describe: Callable[[Mapping[str, Tensor]], str]
    component: Callable[[str], str | None]
    target_layer: Callable[[nn.Module], nn.Module]
    classifier_args: Mapping[str, Any] = field(default_factory=dict)
    unless: str | None = None
    file_format: Callable[[Iterable[str]], str] | None = None
    rename: Callable[[str], str] = _same_name
    reshape: Callable[[str, Tensor], Tensor] = _same_shape
    fit: Callable[
        [Mapping[str, Tensor], nn.Module, Mapping[str, tuple[int, int]]],
        tuple[dict[str, Tensor], list[str]],
    ] = _same_tensors

    def format_of(self, keys: Iterable[str]) -> str:
        """What the naming of a file is called; the family's name if it has only one."""
        return self.file_format(keys) if self.file_format else self.name

    def prefixes(self, keys: Iterable[str]) -> set[str]:
        """What stands before the names of each backbone of this family."""
        found = {_prefix(self.signature, key) for key in keys} - {None}
        if found and self.unless:
            found -= {_prefix(self.unless, key) for key in keys}
        return found


def _prefix(pattern: str, key: str) -> str | None:
    match = re.fullmatch(rf'(?P<prefix>(?:.*\.)?){pattern}', key)
    return match and match['prefix']


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Make a family known to builders, checkpoints, layer decay and analysis.

    Args:
        family: Its record. ``family.backbone`` is registered for configs by itself,
            with ``@MODELS.register_module()``.

    Returns:
        The record.

    Raises:
        ValueError: Its name or title is taken, or one of its models has the name of
            another family's.
    """
    for other in _FAMILIES.values():
        if family.name == other.name or family.title == other.title:
            raise ValueError(
                f"there is a family '{other.name}' ({other.title}) already; give the "
                'new one another name and another title'
            )
    taken = {model for model, _, _ in models()}
    for arch in family.archs:
        if f'{family.name}_{arch}' in taken:
            raise ValueError(
                f"there is a model '{family.name}_{arch}' already; give the arch or "
                'the family another name'
            )
    _FAMILIES[family.name] = family
    return family


def families() -> tuple[Family, ...]:
    """All families, in the order of their registration."""
    return tuple(_FAMILIES.values())


def models() -> list[tuple[str, Family, str]]:
    """Name, family and arch of every model, sorted by name."""
    return sorted(
        (
            (f'{family.name}_{arch}', family, arch)
            for family in families()
            for arch in family.archs
        ),
        key=lambda model: model[0],
    )


@dataclass(frozen=True)
class Recognised:
    """Whose names these are.

    Attributes:
        family: The family.
        prefix: What precedes the backbone's own names, such as ``'backbone.'``.
    """

    family: Family
    prefix: str


def recognise(keys: Iterable[str], what: str, prefix: str | None = None) -> Recognised:
    """Find family and prefix of the backbone in a state dict.

    Args:
        keys: Names of a state dict.
        what: How to call their owner in an error message.
        prefix: Which backbone, if there are several.

    Raises:
        CheckpointError: No family, or several backbones in one state dict.
    """
    keys = list(keys)
    for family in families():
        prefixes = family.prefixes(keys)
        if len(prefixes) > 1 and prefix in prefixes:
            return Recognised(family, prefix)
        if len(prefixes) > 1:
            raise CheckpointError(
                f'{what} has several {family.title} backbones: {sorted(prefixes)}; '
                'choose one with prefix='
            )
        if prefixes:
            return Recognised(family, prefixes.pop())
    raise CheckpointError(
        f'{what} is of none of the families {[f.title for f in families()]}; its keys '
        f'start with {keys[:5]}'
    )
