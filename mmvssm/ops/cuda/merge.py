"""Sums of maps by a CUDA kernel."""

import ctypes
from ctypes import c_int64, c_void_p

from torch import Tensor

from mmvssm.ops.cuda.kernels import Kernel
from mmvssm.ops.cuda.one_state_call import DTYPES
from mmvssm.ops.kernel_args import fields

MERGE = Kernel('merge.cu', 'merge')


class _Args(ctypes.Structure):
    _fields_ = fields((c_void_p, 'parts out'), (c_int64, 'size count'))


def merge(parts: Tensor, out: Tensor) -> None:
    """Add up the first axis of float32 ``parts``; both are contiguous."""
    width = 4 if out.numel() % 4 == 0 else 1
    threads = 256
    args = _Args(
        parts=parts.data_ptr(),
        out=out.data_ptr(),
        size=out.numel(),
        count=len(parts),
    )
    MERGE.launch(
        dict(THREADS=threads, WIDTH=width, OUT_DTYPE=DTYPES[out.dtype]),
        args,
        grid=-(-out.numel() // (threads * width)),
        threads=threads,
        on=out,
    )
