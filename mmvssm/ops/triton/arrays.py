"""Tensors as the Triton kernels take them."""

from typing import NamedTuple

from torch import Tensor


class Array(NamedTuple):
    """A tensor with the strides of its axes, so that any layout is read in place."""

    pointer: Tensor
    strides: tuple[int, ...]


def array(x: Tensor | None) -> Array | None:
    """The array of a tensor, None for None."""
    return None if x is None else Array(x, x.stride())
