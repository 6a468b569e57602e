"""The convolutions of both directions of a bidirectional scan, and their gradients."""

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from mmvssm.ops.bidirectional_scan.direction import Direction
from mmvssm.ops.cuda import kernels
from mmvssm.ops.cuda.kernels import Kernel
from mmvssm.ops.cuda.rows import DTYPES, Rows, aligned, empty_rows
from mmvssm.ops.kernel_args import parameter, pointer

_FORWARD = Kernel('convolution.cu', 'convolve')
_BACKWARD = Kernel('convolution.cu', 'convolve_backward')
_WARP = 32
# Warps of a CTA.
_WARPS = 4
# Warps of the GPU for each of its multiprocessors, before runs of rows get longer.
_WARPS_OF_MULTIPROCESSOR = 16
_LONGEST_RUN = 64
# Of shared memory that a warp has: so many warps fit on a multiprocessor.
_SHARED_OF_WARP = 12 * 1024


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, c_int32)
        for name in 'length channels channel_blocks rows_of_run runs batch'.split()
    ]


class _ForwardWay(ctypes.Structure):
    _fields_ = [('weight', c_void_p), ('bias', c_void_p), ('out', Rows)]


class _ForwardArgs(ctypes.Structure):
    _fields_ = [('x', Rows), ('ways', _ForwardWay * 2), ('shape', _Shape)]


class _BackwardWay(ctypes.Structure):
    _fields_ = [('weight', c_void_p), ('bias', c_void_p), ('grads', Rows * 2)]


class _BackwardArgs(ctypes.Structure):
    _fields_ = [
        *(('x', Rows), ('grad_x', Rows), ('ways', _BackwardWay * 2)),
        *(('sums', c_void_p), ('shape', _Shape)),
    ]


class _Launch(NamedTuple):
    """How the sequences are shared out.

    Attributes:
        shape: What the kernel is told of it.
        constants: TAPS, CHANNELS, POSITIONS and THREADS.
        grid: CTAs, those of all channel blocks next to each other.
    """

    shape: _Shape
    constants: dict[str, int]
    grid: int

    @classmethod
    def of(cls, x: Tensor, taps: int, vector: int, rows: int) -> '_Launch':
        """For a sequence (B, L, D).

        Args:
            x: The sequence.
            taps: Of the convolutions.
            vector: Channels of a thread.
            rows: That a warp takes in one pass.
        """
        batch, length, channels = x.shape
        if max(x.shape) >= 2**30:
            raise ValueError(f"the backend 'cuda' counts to 2^30, got {tuple(x.shape)}")
        # Those behind the sequence are of the direction that runs from the end.
        total = length + taps - 1
        blocks = -(-channels // (_WARP * vector))
        wanted = _WARPS_OF_MULTIPROCESSOR * kernels.multiprocessors(x)
        runs = max(-(-wanted // (blocks * batch)), -(-total // _LONGEST_RUN))
        of_run = -(-total // (runs * rows)) * rows
        runs = -(-total // of_run)
        return cls(
            _Shape(length, channels, blocks, of_run, runs, batch),
            dict(
                TAPS=taps,
                CHANNELS=_WARP * vector,
                POSITIONS=rows * _WARPS,
                THREADS=_WARP * _WARPS,
            ),
            blocks * -(-batch * runs // _WARPS),
        )


def convolve(x: Tensor, weights: Sequence[Direction]) -> list[Tensor]:
    """SiLU of the convolutions of both directions.

    Args:
        x: Sequence (B, L, D), float32, bfloat16 or float16.
        weights: Of the first direction and of the one that runs from the end, with
            the same number of taps.

    Returns:
        For each direction (B, L, D) in x's dtype, channels next to each other.

    Raises:
        ValueError: A size is 2^30 or more.
    """
    us = [empty_rows(x, x.dtype) for _ in weights]
    if not x.numel():
        return us
    x = aligned(x)
    taps = weights[0].conv_weight.shape[1]
    launch = _Launch.of(x, taps, vector=4 if taps <= 4 else 2, rows=16 // x.itemsize)
    args = _ForwardArgs(x=Rows.of(x), shape=launch.shape)
    kept = []
    for way, u, w in zip(args.ways, us, weights):
        weight, bias = parameter(w.conv_weight), parameter(w.conv_bias)
        kept += [weight, bias]
        way.weight, way.bias, way.out = pointer(weight), pointer(bias), Rows.of(u)
    constants = launch.constants | dict(X_DTYPE=DTYPES[x.dtype])
    _FORWARD.launch(
        constants, args, grid=launch.grid, threads=constants['THREADS'], on=x
    )
    return us


def convolve_backward(
    x: Tensor, weights: Sequence[Direction], grad_us: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Gradients of :func:`convolve`.

    Args:
        x, weights: As there.
        grad_us: For each direction two terms of the gradient of its result (B, L, D),
            the first ones in one dtype, and the second ones.

    Returns:
        The gradient of x (B, L, D) in its dtype, and for each direction those of the
        weight (D, W) and the bias (D,), contiguous float32.

    Raises:
        ValueError: A size is 2^30 or more.
    """
    grad_x = empty_rows(x, x.dtype)
    taps, channels = weights[0].conv_weight.shape[1], x.shape[2]
    if not x.numel():
        return grad_x, [
            (torch.zeros_like(w.conv_weight), torch.zeros_like(w.conv_bias))
            for w in weights
        ]
    x = aligned(x)
    grads = [[aligned(grad) for grad in pair] for pair in grad_us]
    # One copy of a warp is of 4 rows, or 8 of half as many channels.
    vector, rows = (2, 4) if taps <= 4 else (1, 8)
    launch = _Launch.of(x, taps, vector, rows)
    blocks = launch.shape.channel_blocks
    parts = launch.grid // blocks
    sums = x.new_empty(parts, 2, taps + 1, channels, dtype=torch.float32)
    args = _BackwardArgs(
        x=Rows.of(x), grad_x=Rows.of(grad_x), sums=pointer(sums), shape=launch.shape
    )
    kept = []
    for way, pair, w in zip(args.ways, grads, weights):
        weight, bias = parameter(w.conv_weight), parameter(w.conv_bias)
        kept += [weight, bias]
        way.weight, way.bias = pointer(weight), pointer(bias)
        way.grads = (Rows * 2)(*(Rows.of(grad) for grad in pair))
    dtypes = (x.dtype, *(grad.dtype for grad in grads[0]))
    of_x, of_a, of_b = (dtype.itemsize for dtype in dtypes)
    stage = rows * _WARP * vector * (of_x + 2 * of_a + 2 * of_b)
    stages = min(3, _SHARED_OF_WARP // stage)
    of_sums = 2 * (taps + 1) * _WARP * vector * sums.itemsize
    constants = launch.constants | {
        f'{name}_DTYPE': DTYPES[dtype] for name, dtype in zip('XAB', dtypes)
    }
    constants['STAGES'] = stages
    _BACKWARD.launch(
        constants,
        args,
        grid=launch.grid,
        threads=constants['THREADS'],
        shared=_WARPS * max(stages * stage, of_sums),
        on=x,
    )
    return grad_x, [
        (s[:-1].mT.clone(memory_format=torch.contiguous_format), s[-1].clone())
        for s in sums.sum(0)
    ]
