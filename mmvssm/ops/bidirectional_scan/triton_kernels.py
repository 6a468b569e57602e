"""Triton kernels of the convolutions of both directions. Needs Triton at import.

A program owns a tile of channels of one batch element and computes blocks of
BLOCK_L positions, one position after the other, from a window of the sequence in
registers that reaches TAPS - 1 positions beyond the block on either side.
Sequences are (B, L, D), arrays with their strides.

A position is fed by itself and those before it; in the second direction, which
runs from the end, by those behind it. So what a block of the first direction
feeds starts with the block and ends beyond it, and what one of the second
direction feeds starts before it.
"""

from typing import Any, NamedTuple

import triton.language as tl

from mmvssm.ops.triton.functions import jit, load, nothing, sigmoid


class Tile(NamedTuple):
    """What a program owns.

    Attributes:
        batch, number: Which element, and which part of the sequence.
        channels, valid: Numbers of the channels (BLOCK_D,) and their mask.
    """

    batch: Any
    number: Any
    channels: Any
    valid: Any


@jit
def _tile(shape: tl.tuple, parts: tl.tensor, BLOCK_D: tl.constexpr) -> Tile:
    """The tile of this program, one of ``parts`` along the sequence."""
    index = tl.program_id(0).to(tl.int64)
    number = index % parts
    index = index // parts
    tiles = (shape[2] + BLOCK_D - 1) // BLOCK_D
    channels = index % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    return Tile(index // tiles, number, channels, channels < shape[2])


@jit
def _places(x: tl.tuple, tile: Tile, t: tl.tensor) -> Any:
    """Pointers to the channels (BLOCK_D,) at position t."""
    here = x.pointer + tile.batch * x.strides[0] + t * x.strides[1]
    return here + tile.channels * x.strides[2]


@jit
def _load(x: tl.tuple, tile: Tile, t: tl.tensor, length: tl.tensor) -> Any:
    """The channels at position t, zero outside the sequence."""
    return load(_places(x, tile, t), tile.valid & (t >= 0) & (t < length))


@jit
def _store(
    x: tl.tuple, tile: Tile, t: tl.tensor, values: tl.tensor, length: tl.tensor
) -> None:
    """Store the channels at position t, nothing behind the sequence."""
    values = values.to(x.pointer.dtype.element_ty)
    tl.store(_places(x, tile, t), values, tile.valid & (t < length))


@jit
def _load_weights(way: tl.tuple, tile: Tile, TAPS: tl.constexpr) -> Any:
    """The columns of the weight and then the bias, a tuple of (BLOCK_D,)."""
    by_channel, by_tap = way.weight.strides
    row = way.weight.pointer + tile.channels * by_channel
    found = nothing()
    for k in tl.static_range(TAPS):
        found = found + (load(row + k * by_tap, tile.valid),)
    bias = way.bias.pointer + tile.channels * way.bias.strides[0]
    return found + (load(bias, tile.valid),)


@jit
def _window(
    x: tl.tuple,
    tile: Tile,
    first: tl.tensor,
    length: tl.tensor,
    TAPS: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> Any:
    """A block and TAPS - 1 positions on either side, a tuple of (BLOCK_D,)."""
    found = nothing()
    for j in tl.static_range(BLOCK_L + 2 * (TAPS - 1)):
        found = found + (_load(x, tile, first - (TAPS - 1) + j, length),)
    return found


@jit
def _convolve(
    window: tl.tuple,
    weights: tl.tuple,
    START: tl.constexpr,
    FROM_END: tl.constexpr,
    TAPS: tl.constexpr,
) -> Any:
    """The convolution, before its SiLU, of TAPS positions of the window."""
    y = weights[TAPS]
    for k in tl.static_range(TAPS):
        y += weights[k] * window[START + (TAPS - 1 - k if FROM_END else k)]
    return y


@jit
def conv_forward_kernel(
    x: tl.tuple,
    ways: tl.tuple,
    shape: tl.tuple,
    parts: tl.tensor,
    TAPS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """SiLU(conv(x)) of both ways; a part of the sequence is one block."""
    tile = _tile(shape, parts, BLOCK_D)
    first = tile.number * BLOCK_L
    window = _window(x, tile, first, shape[1], TAPS, BLOCK_L)
    for i in tl.static_range(2):
        weights = _load_weights(ways[i], tile, TAPS)
        for j in tl.static_range(BLOCK_L):
            y = _convolve(window, weights, j + i * (TAPS - 1), i == 1, TAPS)
            _store(ways[i].out, tile, first + j, y * sigmoid(y), shape[1])


@jit
def _load_gradients(
    way: tl.tuple,
    window: tl.tuple,
    weights: tl.tuple,
    tile: Tile,
    first: tl.tensor,
    length: tl.tensor,
    FROM_END: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> Any:
    """Gradients of the convolution before its SiLU at all that a block feeds."""
    found = nothing()
    for j in tl.static_range(BLOCK_L + TAPS - 1):
        t = first + (j - (TAPS - 1) if FROM_END else j)
        grad = _load(way.grads[0], tile, t, length)
        grad += _load(way.grads[1], tile, t, length)
        y = _convolve(window, weights, j, FROM_END, TAPS)
        opened = sigmoid(y)
        found = found + (grad * opened * (1.0 + y * (1.0 - opened)),)
    return found


@jit
def _add_up(
    sums: tl.tuple,
    grads: tl.tuple,
    window: tl.tuple,
    FROM_END: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> Any:
    """Add a block's gradients of the weights and the bias to their sums."""
    # Where the block starts in ``grads``.
    OWN: tl.constexpr = TAPS - 1 if FROM_END else 0
    found = nothing()
    for k in tl.static_range(TAPS):
        total = sums[k]
        for j in tl.static_range(OWN, OWN + BLOCK_L):
            total += grads[j] * window[j + (TAPS - 1 - k if FROM_END else k)]
        found = found + (total,)
    total = sums[TAPS]
    for j in tl.static_range(OWN, OWN + BLOCK_L):
        total += grads[j]
    return found + (total,)


@jit
def _fed_gradients(
    grads: tl.tuple,
    weights: tl.tuple,
    FROM_END: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> Any:
    """Gradients of the positions of a block by what they feed."""
    found = nothing()
    for j in tl.static_range(BLOCK_L):
        total = weights[0] * grads[j + (0 if FROM_END else TAPS - 1)]
        for k in tl.static_range(1, TAPS):
            total += weights[k] * grads[j + (k if FROM_END else TAPS - 1 - k)]
        found = found + (total,)
    return found


@jit
def conv_backward_kernel(
    x: tl.tuple,
    grad_x: tl.tuple,
    ways: tl.tuple,
    shape: tl.tuple,
    parts: tl.tensor,
    repeats: tl.tensor,
    TAPS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Gradients of x and, in parts to be summed, of the weights.

    A part of the sequence is ``repeats`` blocks. ``way.sums`` is contiguous
    (batch, parts, TAPS + 1, channels): the bias comes last.
    """
    tile = _tile(shape, parts, BLOCK_D)
    zeros = nothing()
    for _ in tl.static_range(TAPS + 1):
        zeros = zeros + (tl.zeros((BLOCK_D,), tl.float32),)
    sums = zeros, zeros
    for number in range(repeats):
        first = (tile.number * repeats + number) * BLOCK_L
        window = _window(x, tile, first, shape[1], TAPS, BLOCK_L)
        added, fed = nothing(), nothing()
        for i in tl.static_range(2):
            weights = _load_weights(ways[i], tile, TAPS)
            grads = _load_gradients(
                *(ways[i], window, weights, tile, first, shape[1]),
                *(i == 1, TAPS, BLOCK_L),
            )
            added = added + (_add_up(sums[i], grads, window, i == 1, TAPS, BLOCK_L),)
            fed = fed + (_fed_gradients(grads, weights, i == 1, TAPS, BLOCK_L),)
        sums = added
        for j in tl.static_range(BLOCK_L):
            _store(grad_x, tile, first + j, fed[0][j] + fed[1][j], shape[1])
    row = (tile.batch * parts + tile.number) * (TAPS + 1)
    for i in tl.static_range(2):
        for k in tl.static_range(TAPS + 1):
            places = ways[i].sums + (row + k) * shape[2] + tile.channels
            tl.store(places, sums[i][k], tile.valid)
