"""A linear layer, the other half of the time that these models take."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvssm.ops import autocast, direct
from mmvssm.ops.backends import choose_backend
from mmvssm.ops.deterministic_math import linear_product, sum_rows


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """x weightᵀ + bias, by the faster of torch's two libraries on the CPU.

    Args:
        x: (..., K).
        weight: (N, K), of x's dtype outside autocast.
        bias: (N,), of x's dtype outside autocast.
        backend: See :func:`mmvssm.ops.selective_scan`; ``cpu`` takes oneDNN
            for float32, all others are ``torch.nn.functional.linear``.

    Returns:
        (..., N).
    """
    inputs = (x, weight, bias)
    if (
        all(t is None or t.dtype == torch.float32 for t in inputs)
        and x.ndim > 1
        and not autocast.is_enabled(x)
        and choose_backend(x.device.type, x.dtype, backend) == 'cpu'
    ):
        return _apply(*inputs)
    return F.linear(x, weight, bias)


def deterministic_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weightᵀ, on the CPU with the same bits at any number of threads.

    Args:
        x: (..., K).
        weight: (N, K), of x's dtype outside autocast.

    Returns:
        (..., N), under autocast in its dtype.
    """
    if x.device.type != 'cpu':
        return F.linear(x, weight)
    if autocast.is_enabled(x):
        dtype = torch.get_autocast_dtype('cpu')
        x, weight = x.to(dtype), weight.to(dtype)
    return _apply(x, weight, None)


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    inputs = (x, weight, bias)
    return (linear_product if direct.possible(*inputs) else _forward_op)(*inputs)


@torch.library.custom_op('mmvssm::linear', mutates_args=())
def _forward_op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear_product(x, weight, bias).contiguous()


@_forward_op.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op('mmvssm::linear_backward', mutates_args=())
def _backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    for_x: bool,
    for_weight: bool,
    for_bias: bool,
) -> list[Tensor]:
    grads, rows = [], grad.flatten(0, -2)
    if for_x:
        grads.append(linear_product(grad, weight.t()).contiguous())
    if for_weight:
        by_weight = linear_product(rows.t(), x.flatten(0, -2).t())
        grads.append(by_weight.contiguous())
    if for_bias:
        grads.append(sum_rows(rows.unsqueeze(0)))
    return grads


@_backward_op.register_fake
def _(grad, x, weight, for_x, for_weight, for_bias):
    shapes = (
        (x.shape, for_x),
        (weight.shape, for_weight),
        (weight.shape[:1], for_bias),
    )
    return [x.new_empty(shape) for shape, needed in shapes if needed]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, grad):
    found = iter(_backward_op(grad, *ctx.saved_tensors, *ctx.needs_input_grad))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
