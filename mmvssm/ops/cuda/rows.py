"""Arrays of rows as the kernels take them: channels next to each other, aligned."""

import ctypes
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from mmvssm.ops.kernel_args import fields

# Bytes that every row begins at a multiple of, and is long: one copy of a thread.
ALIGNMENT = 16
# Channels that fill it up in any dtype.
_CHANNELS = 8
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Rows(ctypes.Structure):
    """An array (batch, row, channel), ``Rows`` in ``vectors.h``; strides in bytes."""

    _fields_ = fields((c_void_p, 'data'), (c_int64, 'of_batch of_row'))

    @classmethod
    def of(cls, x: Tensor) -> 'Rows':
        """The array of a tensor that :func:`aligned` gave."""
        of_batch, of_row, _ = (size * x.element_size() for size in x.stride())
        return cls(x.data_ptr(), of_batch, of_row)


def aligned(x: Tensor) -> Tensor:
    """The tensor (B, L, D), or a copy if its rows are not aligned or not whole."""
    *strides, of_channel = x.stride()
    places = [x.element_size() * size for size in (*strides, x.shape[2])]
    places.append(x.data_ptr())
    if of_channel == 1 and all(place % ALIGNMENT == 0 for place in places):
        return x
    return empty_rows(x, x.dtype).copy_(x)


def empty_rows(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for a tensor (B, L, D) with aligned rows; contiguous if they are whole."""
    batch, length, channels = like.shape
    whole = -(-channels // _CHANNELS) * _CHANNELS
    return like.new_empty(batch, length, whole, dtype=dtype)[..., :channels]
