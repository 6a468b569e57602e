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
from mmvssm.ops.kernel_args import fields, parameter, pointer

_FORWARD = Kernel('convolution.cu', 'convolve')
_BACKWARD = Kernel('convolution.cu', 'convolve_backward')
_WARP = 32
# Warps of a CTA.
_WARPS = 4
# Runs are made shorter until the GPU has so many warps for each multiprocessor.
_WARPS_OF_MULTIPROCESSOR = 16
_LONGEST_RUN = 64
# Bytes of shared memory of a warp, of which so many are to fit on a multiprocessor.
_SHARED_OF_WARP = 12 * 1024


class _Shape(ctypes.Structure):
    _fields_ = fields(
        (c_int32, 'length channels channel_blocks rows_of_run runs batch')
    )


class _ForwardDirection(ctypes.Structure):
    _fields_ = fields((c_void_p, 'weight bias'), (Rows, 'out'))


class _ForwardArgs(ctypes.Structure):
    _fields_ = fields(
        (Rows, 'x'), (_ForwardDirection * 2, 'directions'), (_Shape, 'shape')
    )


class _BackwardDirection(ctypes.Structure):
    _fields_ = fields((c_void_p, 'weight bias'), (Rows * 2, 'grads'))


class _BackwardArgs(ctypes.Structure):
    _fields_ = fields(
        *((Rows, 'x grad_x'), (_BackwardDirection * 2, 'directions')),
        *((c_void_p, 'sums'), (_Shape, 'shape')),
    )


class _Config(NamedTuple):
    """How the sequences are shared out.

    Attributes:
        shape: What the kernel is told of it.
        constants: TAPS, CHANNELS, POSITIONS and THREADS.
        parts: CTAs of each channel block.
    """

    shape: _Shape
    constants: dict[str, int]
    parts: int

    @classmethod
    def of(cls, x: Tensor, taps: int, vector: int, rows: int) -> '_Config':
        """For a sequence (B, L, D).

        Args:
            x: The sequence.
            taps: Of the convolutions.
            vector: Channels of a thread.
            rows: That a warp takes in one pass.

        Raises:
            ValueError: A size is 2^30 or more.
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
        constants = dict(
            TAPS=taps,
            CHANNELS=_WARP * vector,
            POSITIONS=rows * _WARPS,
            THREADS=_WARP * _WARPS,
        )
        if batch * runs >= 2**30:
            raise ValueError(f"too large for the backend 'cuda': {tuple(x.shape)}")
        shape = _Shape(length, channels, blocks, of_run, runs, batch)
        return cls(shape, constants, parts=-(-batch * runs // _WARPS))

    @property
    def grid(self) -> int:
        """All CTAs."""
        return self.parts * int(self.shape.channel_blocks)


class _Weights(NamedTuple):
    """Weight (D, W) and bias (D,) of a direction, contiguous float32."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, direction: Direction) -> '_Weights':
        return cls(parameter(direction.conv_weight), parameter(direction.conv_bias))

    def pointers(self) -> dict[str, int | None]:
        """By the names that the kernels' arguments have."""
        return dict(weight=pointer(self.weight), bias=pointer(self.bias))


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
    x, directions = aligned(x), [_Weights.of(w) for w in weights]
    taps = directions[0].weight.shape[1]
    config = _Config.of(x, taps, vector=4 if taps <= 4 else 2, rows=6)
    args = _ForwardArgs(
        x=Rows.of(x),
        directions=tuple(
            _ForwardDirection(**direction.pointers(), out=Rows.of(u))
            for direction, u in zip(directions, us)
        ),
        shape=config.shape,
    )
    constants = config.constants | dict(X_DTYPE=DTYPES[x.dtype])
    _FORWARD.launch(
        constants, args, grid=config.grid, threads=constants['THREADS'], on=x
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
    x, directions = aligned(x), [_Weights.of(w) for w in weights]
    if not x.numel():
        return grad_x, [
            (torch.zeros_like(w), torch.zeros_like(b)) for w, b in directions
        ]
    grads = [tuple(map(aligned, pair)) for pair in grad_us]
    taps = directions[0].weight.shape[1]
    # One copy of a warp is of 4 rows, or 8 of half as many channels.
    vector, rows = (2, 4) if taps <= 4 else (1, 8)
    config = _Config.of(x, taps, vector, rows)
    sums = x.new_empty(config.parts, 2, taps + 1, x.shape[2], dtype=torch.float32)
    args = _BackwardArgs(
        x=Rows.of(x),
        grad_x=Rows.of(grad_x),
        directions=tuple(
            _BackwardDirection(**direction.pointers(), grads=tuple(map(Rows.of, pair)))
            for direction, pair in zip(directions, grads)
        ),
        sums=pointer(sums),
        shape=config.shape,
    )
    dtypes = dict(zip('XAB', (x.dtype, *(grad.dtype for grad in grads[0]))))
    of_x, of_a, of_b = (dtype.itemsize for dtype in dtypes.values())
    stage = rows * config.constants['CHANNELS'] * (of_x + 2 * of_a + 2 * of_b)
    stages = min(3, _SHARED_OF_WARP // stage)
    of_sums = 2 * (taps + 1) * config.constants['CHANNELS'] * sums.itemsize
    _BACKWARD.launch(
        config.constants
        | {f'{name}_DTYPE': DTYPES[dtype] for name, dtype in dtypes.items()}
        | dict(STAGES=stages),
        args,
        grid=config.grid,
        threads=config.constants['THREADS'],
        shared=_WARPS * max(stages * stage, of_sums),
        on=x,
    )
    return grad_x, [
        (s[:-1].mT.clone(memory_format=torch.contiguous_format), s[-1].clone())
        for s in sums.sum(0)
    ]
