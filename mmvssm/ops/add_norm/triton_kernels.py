"""Triton kernels of residual addition and RMS norm. Needs Triton at import.

A program owns whole rows, BLOCK_R at a time. Matrices are arrays (rows,
channels) with their strides, ``shape`` is theirs.
"""

from typing import Any

import triton.language as tl

from mmvssm.ops.triton.functions import jit, load


@jit
def _places(x: tl.tuple, rows: tl.tensor, columns: tl.tensor) -> Any:
    """Pointers to (BLOCK_R, BLOCK_C) elements."""
    by_row, by_column = x.strides
    return x.pointer + rows[:, None] * by_row + columns[None, :] * by_column


@jit
def _load(x: tl.tuple, rows: tl.tensor, columns: tl.tensor, mask: tl.tensor) -> Any:
    """Elements in float32, zeros for None."""
    if x is None:
        return tl.zeros(mask.shape, tl.float32)
    else:
        return load(_places(x, rows, columns), mask)


@jit
def _store(
    x: tl.tuple, rows: tl.tensor, columns: tl.tensor, values: tl.tensor, mask: tl.tensor
) -> None:
    """Store elements in the dtype of the array, nothing for None."""
    if x is not None:
        values = values.to(x.pointer.dtype.element_ty)
        tl.store(_places(x, rows, columns), values, mask)


@jit
def _inverse_root(total: tl.tensor, shape: tl.tuple, eps: tl.tensor) -> Any:
    """1 / root of the mean square of each row, (BLOCK_R, 1)."""
    mean_square = tl.sum(total * total, axis=1) / shape[1]
    return (1.0 / tl.sqrt(mean_square + eps))[:, None]


@jit
def forward_kernel(
    x: tl.tuple,
    residual: tl.tuple,
    weight: tl.tensor,
    total: tl.tuple,
    out: tl.tuple,
    shape: tl.tuple,
    eps: tl.tensor,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """The sum of x and residual (None for zero), and its norm."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_C)
    mask = (rows < shape[0])[:, None] & (columns < shape[1])[None, :]
    sums = _load(x, rows, columns, mask) + _load(residual, rows, columns, mask)
    _store(total, rows, columns, sums, mask)
    scale = load(weight + columns, columns < shape[1])
    y = sums * _inverse_root(sums, shape, eps) * scale[None, :]
    _store(out, rows, columns, y, mask)


@jit
def backward_kernel(
    x: tl.tuple,
    residual: tl.tuple,
    weight: tl.tensor,
    grad_out: tl.tuple,
    grad_total: tl.tuple,
    grads: tl.tuple,
    by_weight: tl.tensor,
    shape: tl.tuple,
    repeats: tl.tensor,
    eps: tl.tensor,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Gradients of the sum, in the dtype of each of ``grads``, and of the weight.

    A program takes ``repeats`` times BLOCK_R rows and leaves the gradient of the
    weight by them in its row of ``by_weight``.
    """
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)
    valid = columns < shape[1]
    scale = load(weight + columns, valid)[None, :]
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for number in range(repeats):
        first = (program * repeats + number) * BLOCK_R
        rows = first + tl.arange(0, BLOCK_R)
        mask = (rows < shape[0])[:, None] & valid[None, :]
        total = _load(x, rows, columns, mask) + _load(residual, rows, columns, mask)
        inverse = _inverse_root(total, shape, eps)
        unit = total * inverse
        grad_y = _load(grad_out, rows, columns, mask)
        sums += tl.sum(grad_y * unit, axis=0)
        grad_unit = grad_y * scale
        along = tl.sum(grad_unit * unit, axis=1)[:, None] / shape[1]
        grad = inverse * (grad_unit - unit * along)
        grad += _load(grad_total, rows, columns, mask)
        for i in tl.static_range(len(grads)):
            _store(grads[i], rows, columns, grad, mask)
    tl.store(by_weight + program * shape[1] + columns, sums, valid)
