"""Families of models. Each has one record, in the file of its backbone.

Builders, checkpoints, layer decay and analysis read these records. No other code names
a family.
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
    """Everything that the package knows about one family of backbones.

    These functions take and return names of parameters without a prefix: the names in
    the bare backbone. Names of the classification head start with ``classifier.``,
    those of a neck with ``neck.``.

    Attributes:
        name: First part of the names of its models: ``'vim'`` for ``'vim_t'``.
        title: Name in messages, such as ``'Vim'``.
        backbone: Its class. It takes the name of an arch, then keywords.
        archs: Arguments of each published arch, by the second part of the name.
        head: Makes the classification head, from the backbone, the name of the arch,
            the number of classes, and options as keywords. ``head`` of this module is
            its last layer, and ``pre_logits`` computes what that layer gets.
        classifier_args: Arguments of the backbone in a classifier.
        signature: Pattern of a name that every model of the family has, and no model
            of another family.
        unless: Pattern of a name that only models of another family have. A state dict
            with such a name does not belong to this family.
        depth: Position of a parameter between the image and the maps: an empty tuple in
            the stem, the number of its block (such as stage and block) in a block, None
            after all blocks. Layer decay uses it.
        describe: Name of the model with the shapes of a state dict, such as
            ``'vim_t'``, or a description of these shapes.
        component: The part of the backbone that a name belongs to. A file must have
            either the whole part or nothing of it. None for a name that may be missing.
        target_layer: The module of a backbone for Grad-CAM. Its output is a map
            (B, C, H, W) or a sequence (B, L, C).
        file_format: Name of the published format of a file, from its names.
        rename: Turns a published name into our own name.
        reshape: Turns the tensor of a file into the one that is stored here; it gets
            our own name and the tensor.
        fit: Fits the tensors of a file to a model (position embeddings, class tokens),
            and returns notes on its changes. The third argument has the grids (rows,
            columns) that the file says its position embeddings have, by the name of
            the module, ``''`` for the backbone itself. It raises
            :class:`mmvssm.errors.CheckpointError` if it cannot fit them.
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
        """Name of the format of a file; the family's name if it has only one format."""
        return self.file_format(keys) if self.file_format else self.name

    def prefixes(self, keys: Iterable[str]) -> set[str]:
        """The prefixes of all backbones of this family."""
        found = {_prefix(self.signature, key) for key in keys} - {None}
        if found and self.unless:
            found -= {_prefix(self.unless, key) for key in keys}
        return found


def _prefix(pattern: str, key: str) -> str | None:
    match = re.fullmatch(rf'(?P<prefix>(?:.*\.)?){pattern}', key)
    return match and match['prefix']


_FAMILIES: dict[str, Family] = {}
_WATCHERS: list[Callable[[Family], None]] = []


def register_family(family: Family) -> Family:
    """Make a family known to builders, checkpoints, layer decay and analysis.

    Args:
        family: Its record. To use ``family.backbone`` in configs, register that class
            with ``@MODELS.register_module()``.

    Returns:
        The record.

    Raises:
        ValueError: Another family has the same name or title, or a model of the same
            name.
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
    for watch in _WATCHERS:
        watch(family)
    _FAMILIES[family.name] = family
    return family


def families() -> tuple[Family, ...]:
    """All families, in the order of their registration."""
    return tuple(_FAMILIES.values())


def watch_families(watch: Callable[[Family], None]) -> None:
    """Have a function called with each family, of now and of later registrations."""
    for family in families():
        watch(family)
    _WATCHERS.append(watch)


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


def family_of(backbone: nn.Module) -> Family | None:
    """The family whose class a backbone is of, or None."""
    return next((f for f in families() if isinstance(backbone, f.backbone)), None)


def layer_depths(family: Family, names: Iterable[str]) -> tuple[dict[str, int], int]:
    """How deep every parameter of a backbone is.

    Args:
        family: Its family.
        names: Names of all of its parameters.

    Returns:
        Depth by name: 0 for the stem, 1 + i for block i, n + 1 for what comes behind
        the n blocks; and n + 1.
    """
    places = {name: family.depth(name) for name in names}
    # The stem is the empty tuple; what comes behind the blocks has no place.
    blocks = sorted({place for place in places.values() if place})
    order = {(): 0, **{place: i + 1 for i, place in enumerate(blocks)}}
    last = len(blocks) + 1
    return {name: order.get(place, last) for name, place in places.items()}, last


@dataclass(frozen=True)
class Recognised:
    """The family of a state dict.

    Attributes:
        family: The family.
        prefix: Prefix of the names of the backbone, such as ``'backbone.'``.
    """

    family: Family
    prefix: str


def recognise(keys: Iterable[str], what: str, prefix: str | None = None) -> Recognised:
    """Find family and prefix of the backbone in a state dict.

    Args:
        keys: Names of a state dict.
        what: Name of the state dict in error messages.
        prefix: Which backbone, if there are several.

    Raises:
        CheckpointError: The names belong to no family, or to several backbones.
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
        f'{what} belongs to none of the families {[f.title for f in families()]}; its '
        f'first keys are {keys[:5]}'
    )
