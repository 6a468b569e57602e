"""Triton kernels of the convolutions of both directions. Needs Triton at import.

A program owns a tile of channels of one batch element and walks BLOCK_L
positions at a time. Sequences are (B, L, D), arrays with their strides. What
the backward direction convolves are the positions behind one, not before it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from mmvssm.ops.triton.functions import load, sigmoid


class Tile(NamedTuple):
    """What a program owns.

    Attributes:
        batch, number: Which element, and which of its blocks of positions.
        channels, valid: Numbers of the channels (BLOCK_D,) and their mask.
    """

    batch: Any
    number: Any
    channels: Any
    valid: Any


@triton.jit
def _tile(shape, numbers, BLOCK_D: tl.constexpr):
    """The tile of this program, one of ``numbers`` along the sequence."""
    index = tl.program_id(0).to(tl.int64)
    number = index % numbers
    index = index // numbers
    tiles = (shape[2] + BLOCK_D - 1) // BLOCK_D
    channels = index % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    return Tile(index // tiles, number, channels, channels < shape[2])


@triton.jit
def _places(x, tile, rows):
    """Pointers to the channels at positions ``rows``, (BLOCK_L, BLOCK_D)."""
    here = x.pointer + tile.batch * x.strides[0]
    return here + rows[:, None] * x.strides[1] + tile.channels[None, :] * x.strides[2]


@triton.jit
def _load(x, tile, rows, length):
    """Channels at positions ``rows``, zero outside the sequence."""
    inside = (rows >= 0) & (rows < length)
    return load(_places(x, tile, rows), inside[:, None] & tile.valid[None, :])


@triton.jit
def _tap(way, tile, k):
    """Column k of the weight, (BLOCK_D,)."""
    by_channel, by_tap = way.weight.strides
    places = way.weight.pointer + tile.channels * by_channel + k * by_tap
    return load(places, tile.valid)


@triton.jit
def _convolve(x, way, tile, rows, length, REVERSE: tl.constexpr, TAPS: tl.constexpr):
    """The convolution at positions ``rows``, before its SiLU."""
    bias = load(way.bias.pointer + tile.channels * way.bias.strides[0], tile.valid)
    sums = tl.zeros((rows.shape[0], bias.shape[0]), tl.float32) + bias[None, :]
    for k in tl.static_range(TAPS):
        back = TAPS - 1 - k
        there = rows + back if REVERSE else rows - back
        sums += _tap(way, tile, k)[None, :] * _load(x, tile, there, length)
    return sums


@triton.jit
def conv_forward_kernel(
    x,
    ways,
    shape,
    blocks,
    TAPS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """SiLU(conv(x)) of both ways; ``blocks`` is the number of them in a sequence."""
    tile = _tile(shape, blocks, BLOCK_D)
    rows = tile.number * BLOCK_L + tl.arange(0, BLOCK_L)
    mask = (rows < shape[1])[:, None] & tile.valid[None, :]
    for i in tl.static_range(2):
        way = ways[i]
        y = _convolve(x, way, tile, rows, shape[1], i == 1, TAPS)
        y *= sigmoid(y)
        y = y.to(way.out.pointer.dtype.element_ty)
        tl.store(_places(way.out, tile, rows), y, mask)


@triton.jit
def _load_gradient(
    x, way, tile, rows, length, REVERSE: tl.constexpr, TAPS: tl.constexpr
):
    """Gradient of the convolution before its SiLU, zero outside the sequence."""
    grad = _load(way.grads[0], tile, rows, length)
    grad += _load(way.grads[1], tile, rows, length)
    y = _convolve(x, way, tile, rows, length, REVERSE, TAPS)
    opened = sigmoid(y)
    return grad * opened * (1.0 + y * (1.0 - opened))


@triton.jit
def conv_backward_kernel(
    x,
    grad_x,
    ways,
    shape,
    parts,
    repeats,
    TAPS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of x and, in parts to be summed, of the weights.

    A sequence is cut into ``parts`` of ``repeats`` blocks. ``way.sums`` is
    contiguous (batch, parts, TAPS + 1, channels): the bias comes last.
    """
    tile = _tile(shape, parts, BLOCK_D)
    length = shape[1]
    sums = ()
    for k in tl.static_range(2 * (TAPS + 1)):
        sums = sums + (tl.zeros((BLOCK_D,), tl.float32),)
    for number in range(repeats):
        rows = (tile.number * repeats + number) * BLOCK_L + tl.arange(0, BLOCK_L)
        total = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
        found = ()
        for i in tl.static_range(2):
            way = ways[i]
            grad = _load_gradient(x, way, tile, rows, length, i == 1, TAPS)
            for k in tl.static_range(TAPS):
                back = TAPS - 1 - k
                there = rows + back if i == 1 else rows - back
                fed = _load(x, tile, there, length)
                found = found + (tl.sum(grad * fed, axis=0),)
            found = found + (tl.sum(grad, axis=0),)
            # What is fed by these positions: themselves and those that follow.
            total += grad * _tap(way, tile, TAPS - 1)[None, :]
            for after in tl.static_range(1, TAPS):
                there = rows - after if i == 1 else rows + after
                grad = _load_gradient(x, way, tile, there, length, i == 1, TAPS)
                total += grad * _tap(way, tile, TAPS - 1 - after)[None, :]
        added = ()
        for k in tl.static_range(2 * (TAPS + 1)):
            added = added + (sums[k] + found[k],)
        sums = added
        mask = (rows < length)[:, None] & tile.valid[None, :]
        total = total.to(grad_x.pointer.dtype.element_ty)
        tl.store(_places(grad_x, tile, rows), total, mask)
    row = (tile.batch * parts + tile.number) * (TAPS + 1)
    for i in tl.static_range(2):
        for k in tl.static_range(TAPS + 1):
            places = ways[i].sums + (row + k) * shape[2] + tile.channels
            tl.store(places, sums[i * (TAPS + 1) + k], tile.valid)
