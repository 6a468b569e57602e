"""Residual addition and RMS norm as one op of torch.library."""

import torch
from torch import Tensor

from mmvssm.ops import direct
from mmvssm.ops.add_norm import cpu_backend, triton_backend

_IMPLEMENTATIONS = {'cpu': cpu_backend, 'triton': triton_backend}


def takes(backend: str, x: Tensor, residual: Tensor | None) -> bool:
    """Whether the backend has it in one piece, for these tensors."""
    if backend not in _IMPLEMENTATIONS or not x.numel():
        return False
    dtypes = _IMPLEMENTATIONS[backend].DTYPES
    return residual is None or residual.dtype in dtypes


def add_rms_norm_fused(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    residual_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """See :func:`mmvssm.ops.add_rms_norm`."""
    shape = x.shape
    x = x.reshape(-1, shape[-1])
    if residual is not None:
        residual = residual.reshape(-1, shape[-1])
    inputs = (x, weight.float(), residual)
    if direct.possible(*inputs):
        forward = _IMPLEMENTATIONS[backend].forward
        out, total = forward(*inputs, eps, residual_dtype)
    else:
        out, total = _forward_op(*inputs, eps, residual_dtype, backend)
    return out.view(shape), total.view(shape)


@torch.library.custom_op('mmvssm::add_rms_norm', mutates_args=())
def _forward_op(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    residual_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _IMPLEMENTATIONS[backend].forward(x, weight, residual, eps, residual_dtype)


@_forward_op.register_fake
def _(x, weight, residual, eps, residual_dtype, backend):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=residual_dtype)


@torch.library.custom_op('mmvssm::add_rms_norm_backward', mutates_args=())
def _backward_op(
    grad_out: Tensor | None,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    other_dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    dtypes = _different(dtype, other_dtype)
    return _IMPLEMENTATIONS[backend].backward(
        grad_out, grad_total, x, weight, residual, eps, dtypes
    )


@_backward_op.register_fake
def _(grad_out, grad_total, x, weight, residual, eps, dtype, other_dtype, backend):
    dtypes = _different(dtype, other_dtype)
    grads = [x.new_empty(x.shape, dtype=dtype) for dtype in dtypes]
    return [weight.new_empty(weight.shape), *grads]


def _different(dtype: torch.dtype, other: torch.dtype) -> list[torch.dtype]:
    """One gradient serves for both terms of the sum if they share a dtype."""
    return [dtype] if dtype == other else [dtype, other]


def _setup_context(ctx, inputs, output):
    x, weight, residual, ctx.eps, _, ctx.backend = inputs
    total = output[1]
    ctx.has_residual = residual is not None
    ctx.dtypes = x.dtype, (x if residual is None else residual).dtype
    # The stream is kept by the next block anyway.
    exact = total.dtype == torch.float32
    ctx.save_for_backward(weight, *((total, None) if exact else (x, residual)))
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_total):
    if grad_out is None and grad_total is None:
        return (None,) * 6
    weight, x, residual = ctx.saved_tensors
    grad_weight, *grads = _backward_op(
        grad_out, grad_total, x, weight, residual, ctx.eps, *ctx.dtypes, ctx.backend
    )
    grad_residual = grads[-1] if ctx.has_residual else None
    return grads[0], grad_weight, grad_residual, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
