"""The linear layer: standard nodes, with nothing to choose."""

from typing import Any

from onnxscript import opset18 as op

from mmvssm.export.bodies.nodes import Call
from mmvssm.ops.linear.declaration import LINEAR as OP  # noqa: F401


def translate(call: Call) -> tuple[Any, ...]:
    """``Gemm`` for a matrix, otherwise ``MatMul`` and ``Add``."""
    x, weight, bias = call.inputs.values()
    if len(x.shape) == 2 and bias is not None:
        return (op.Gemm(x, weight, bias, transB=1),)
    y = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return (y if bias is None else op.Add(y, bias),)
