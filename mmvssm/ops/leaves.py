"""Flatten NamedTuples of tensors for torch, and pack them again."""

import functools
import itertools
import typing
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

I = TypeVar('I', bound=NamedTuple)  # noqa: E741


def names_of(
    kind: type[tuple[Any, ...]], prefix: str = '', between: str = '_'
) -> tuple[str, ...]:
    """Names of the tensors in a NamedTuple; a nested one has its tuple's name first."""
    found: list[str] = []
    for name, hint in typing.get_type_hints(kind).items():
        nested = isinstance(hint, type) and issubclass(hint, tuple)
        inner = names_of(hint, f'{prefix}{name}{between}', between) if nested else ()
        found += inner or [f'{prefix}{name}']
    return tuple(found)


def optional_of(kind: type[tuple[Any, ...]]) -> tuple[bool, ...]:
    """For every tensor in a NamedTuple, whether it may be None."""
    found: list[bool] = []
    for hint in typing.get_type_hints(kind).values():
        nested = isinstance(hint, type) and issubclass(hint, tuple)
        found += optional_of(hint) if nested else [type(None) in typing.get_args(hint)]
    return tuple(found)


def leaves_of(inputs: Iterable[Any]) -> list[Any]:
    """The tensors of a NamedTuple in order; None for one that is missing."""
    found: list[Any] = []
    for x in inputs:
        if isinstance(x, tuple):
            found.extend(leaves_of(x))
        else:
            found.append(x)
    return found


def pack(kind: type[I], leaves: Iterator[Any]) -> I:
    """The NamedTuple of these tensors."""
    nested = _inner(kind)
    if nested is None:
        # The usual case, and the fast one: this runs in every call.
        return kind._make(itertools.islice(leaves, len(kind._fields)))
    return kind._make(
        next(leaves) if inner is None else pack(inner, leaves) for inner in nested
    )


@functools.cache
def _inner(kind: type[tuple[Any, ...]]) -> tuple[Any, ...] | None:
    """For each field its NamedTuple type, or None; None if no field has one."""
    hints = typing.get_type_hints(kind).values()
    found = tuple(
        hint if isinstance(hint, type) and issubclass(hint, tuple) else None
        for hint in hints
    )
    return found if any(found) else None


def shapes_of(inputs: I) -> I:
    """The NamedTuple with the shape of each tensor instead of the tensor."""
    kind = type(inputs)
    leaves = leaves_of(inputs)
    return pack(kind, iter([None if x is None else x.shape for x in leaves]))


def tensors_in(arguments: Iterable[Any]) -> list[Tensor]:
    """The tensors among the arguments of a call."""
    return [x for x in leaves_of(arguments) if isinstance(x, Tensor)]
