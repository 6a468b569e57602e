"""Residual addition and RMS norm by compiled CPU kernels, forward and backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmvssm.ops.cpu import library
from mmvssm.ops.cpu.library import Array, NormProblem
from mmvssm.ops.structures import pointer

DTYPES = (torch.float32, torch.bfloat16)


def _readable(x: Tensor | None) -> Tensor | None:
    """The tensor (rows, channels) with its channels next to each other."""
    return x if x is None or x.stride(1) == 1 else x.contiguous()


def forward(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See :func:`mmvssm.ops.add_rms_norm`; tensors are (rows, channels)."""
    x, residual, weight = _readable(x), _readable(residual), weight.contiguous()
    out, total = x.new_empty(x.shape), x.new_empty(x.shape, dtype=residual_dtype)
    problem = NormProblem(
        *(*x.shape, eps),
        *(Array.of(t) for t in (x, residual, total, out)),
        pointer(weight),
    )
    library.call('norm_forward', problem)
    return out, total


def backward(
    grad_out: Tensor | None,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    dtypes: Sequence[torch.dtype],
) -> list[Tensor]:
    """Gradients of the weight and of the sum, the latter in each of ``dtypes``.

    Args:
        grad_out: Gradient of the norm, None for zero.
        grad_total: Gradient of the sum, None for zero.
        x, residual: Terms of the sum, or the sum and None.
    """
    tensors = (x, residual, grad_out, grad_total)
    x, residual, grad_out, grad_total = (_readable(t) for t in tensors)
    weight = weight.contiguous()
    rows, channels = x.shape
    grads = [x.new_empty(x.shape, dtype=dtype) for dtype in dtypes]
    blocks = -(-rows // library.norm_rows())
    by_block = weight.new_empty(blocks, channels)
    problem = NormProblem(
        *(rows, channels, eps, Array.of(x), Array.of(residual), Array(), Array()),
        *(pointer(weight), Array.of(grad_out), Array.of(grad_total)),
        *(Array.of(grads[0]), Array.of(grads[1] if len(grads) > 1 else None)),
        pointer(by_block),
    )
    library.call('norm_backward', problem)
    return [by_block.sum(0), *grads]
