"""A linear layer without bias around the scans."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvssm.ops import autocast, direct
from mmvssm.ops.backends import choose_backend
from mmvssm.ops.linear.product import product


def linear(x: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """x weightᵀ, by the faster of torch's two libraries on the CPU.

    Args:
        x: (..., K).
        weight: (N, K), of x's dtype outside autocast.
        backend: See :func:`mmvssm.ops.selective_scan`; ``cpu`` takes oneDNN
            for float32, all others are ``torch.nn.functional.linear``.

    Returns:
        (..., N).
    """
    if (
        x.dtype == weight.dtype == torch.float32
        and x.ndim > 1
        and not autocast.is_enabled(x)
        and choose_backend(x.device.type, x.dtype, backend) == 'cpu'
    ):
        return (product if direct.possible(x, weight) else _forward_op)(x, weight)
    return F.linear(x, weight)


@torch.library.custom_op('mmvssm::linear', mutates_args=())
def _forward_op(x: Tensor, weight: Tensor) -> Tensor:
    return product(x, weight)


@_forward_op.register_fake
def _(x, weight):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op('mmvssm::linear_backward', mutates_args=())
def _backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, for_x: bool, for_weight: bool
) -> list[Tensor]:
    grads = []
    if for_x:
        grads.append(product(grad, weight.t()))
    if for_weight:
        grads.append(product(grad.flatten(0, -2).t(), x.flatten(0, -2).t()))
    return grads


@_backward_op.register_fake
def _(grad, x, weight, for_x, for_weight):
    inputs = ((x, for_x), (weight, for_weight))
    return [t.new_empty(t.shape) for t, needed in inputs if needed]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    found = iter(_backward_op(grad, *ctx.saved_tensors, *ctx.needs_input_grad))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
