"""Operators of torch that its exporter to ONNX translates wrongly, or too loosely."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import FLOAT, INT64
from onnxscript import opset18 as op


def translations() -> dict[Callable, Callable]:
    """Entries for ``custom_translation_table`` of ``torch.onnx.export``."""
    aten = torch.ops.aten
    return {
        aten.adaptive_avg_pool2d.default: adaptive_avg_pool2d,
        aten._adaptive_avg_pool2d.default: adaptive_avg_pool2d,
        aten.upsample_bilinear2d.default: upsample_bilinear2d,
        aten.upsample_bilinear2d.vec: upsample_bilinear2d_vec,
        aten.gelu.default: gelu,
        operator.floordiv: floordiv,
    }


def floordiv(self: INT64, other: INT64) -> INT64:
    """``//`` of sizes, rounding down.

    torch's translation rounds towards zero. So ``-(-size // 4)``, which is how one
    rounds up, rounds down.
    """
    # The sign of the remainder is that of the divisor, as in Python.
    return op.Div(op.Sub(self, op.Mod(self, other)), other)


def gelu(self: FLOAT, approximate: str = 'none') -> FLOAT:
    """x (1 + erf(x / sqrt 2)) / 2, or its approximation by tanh.

    The order of the products is that of the pattern in whose place onnxruntime takes
    one operator. It does not know torch's order.
    """
    if approximate == 'tanh':
        cube = op.Mul(op.Mul(self, self), self)
        inner = op.Add(self, op.Mul(cube, _number(0.044715)))
        curve = op.Tanh(op.Mul(inner, _number(math.sqrt(2 / math.pi))))
    else:
        curve = op.Erf(op.Div(self, _number(math.sqrt(2))))
    return op.Mul(op.Mul(self, op.Add(curve, _number(1.0))), _number(0.5))


def _number(value: float) -> Any:
    return op.Constant(value_float=value)


def adaptive_avg_pool2d(self: FLOAT, output_size: Sequence[int]) -> FLOAT:
    """Two products with matrices that the graph makes from the size of the map.

    torch's translation is an ``AveragePool`` for the size of the example: at any other
    size it averages over wrong places, without a word.
    """
    if list(output_size) == [1, 1]:
        return op.ReduceMean(self, op.Constant(value_ints=[2, 3]), keepdims=1)
    height = op.Shape(self, start=2, end=3)
    width = op.Shape(self, start=3, end=4)
    down = _averages(height, int(output_size[0]))
    across = _averages(width, int(output_size[1]))
    return op.MatMul(down, op.MatMul(self, op.Transpose(across, perm=[1, 0])))


def _averages(length: Any, count: int) -> Any:
    """(count, length): row i averages over the places that torch's output i has."""
    starts, ends = (
        op.Div(
            op.Add(op.Mul(_column(range(first, count + first)), length), more), count_
        )
        for first, more, count_ in (
            (0, _scalar(0), _scalar(count)),
            (1, _scalar(count - 1), _scalar(count)),
        )
    )
    places = op.Range(_scalar(0), op.Squeeze(length), _scalar(1))
    inside = op.And(op.GreaterOrEqual(places, starts), op.Less(places, ends))
    number = op.Cast(op.Sub(ends, starts), to=1)
    return op.Div(op.Cast(inside, to=1), number)


def _scalar(value: int) -> Any:
    return op.Constant(value_int=value)


def _column(values: Sequence[int]) -> Any:
    return op.Unsqueeze(
        op.Constant(value_ints=list(values)), op.Constant(value_ints=[1])
    )


def upsample_bilinear2d(
    self: FLOAT,
    output_size: INT64,
    align_corners: bool,
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> FLOAT:
    """``Resize`` to a size.

    torch's translation is ``pytorch_half_pixel``, which at a length of 1 takes the
    first place, where torch takes the middle.
    """
    return _resize(self, output_size, align_corners)


def upsample_bilinear2d_vec(
    self: FLOAT,
    output_size: INT64 | None,
    align_corners: bool,
    scale_factors: Sequence[float] | None,
) -> FLOAT:
    """:func:`upsample_bilinear2d`, or ``Resize`` by factors."""
    if output_size is not None:
        return _resize(self, output_size, align_corners)
    return op.Resize(
        self,
        None,
        op.Constant(value_floats=[1.0, 1.0, *scale_factors]),
        mode='linear',
        coordinate_transformation_mode=_coordinates(align_corners),
    )


def _resize(x: Any, size: Any, align_corners: bool) -> Any:
    whole = op.Concat(op.Shape(x, start=0, end=2), op.Cast(size, to=7), axis=0)
    mode = _coordinates(align_corners)
    return op.Resize(
        x, None, None, whole, mode='linear', coordinate_transformation_mode=mode
    )


def _coordinates(align_corners: bool) -> str:
    return 'align_corners' if align_corners else 'half_pixel'
