"""Kernel args: tensors and structures for compiled code, through ctypes."""

import ctypes
from ctypes import c_int64, c_void_p
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmvssm.ops.typed import MaybeTensor


class Array(ctypes.Structure):
    """A tensor of up to four axes, as in the CPU kernels' ``kernel_args.h``.

    Attributes:
        dtypes: Dtypes that the kernels can read, with their numbers.
    """

    _fields_ = [('data', c_void_p), ('dtype', c_int64), ('stride', c_int64 * 4)]
    dtypes: ClassVar[dict[torch.dtype, int]] = {
        torch.float32: 0,
        torch.bfloat16: 1,
        torch.float16: 2,
    }

    @classmethod
    def of(cls, x: Tensor | None) -> 'Array':
        """The array of a tensor; all zeros for None."""
        if x is None:
            return cls()
        return cls(x.data_ptr(), cls.dtypes[x.dtype], x.stride())


def fields(*kinds: tuple[type[Any], str]) -> list[tuple[str, type[Any]]]:
    """Fields of a structure; each pair is a type and the names of its fields."""
    return [(field, kind) for kind, names in kinds for field in names.split()]


def pointer(x: Tensor | None) -> int | None:
    """Address of a tensor's memory; None for None."""
    return None if x is None else x.data_ptr()


def readable(x: MaybeTensor, array: type[Array]) -> MaybeTensor:
    """The tensor, converted to float32 if the kernels cannot read its dtype."""
    return x if x is None or x.dtype in array.dtypes else x.float()


def parameter(x: MaybeTensor) -> MaybeTensor:
    """The tensor as contiguous float32, as kernels with plain pointers need it."""
    return None if x is None else x.float().contiguous()
