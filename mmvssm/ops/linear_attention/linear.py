"""Linear attention by sums over the keys, which all queries share."""

from typing import Any

import torch
from torch import Tensor

from mmvssm.ops import autocast
from mmvssm.ops.rotary import rotate


def linear_attention_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    rotary: tuple[Tensor, Tensor] | None,
    normalise: bool,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`mmvssm.ops.linear_attention`; ``dtype`` is that of the result.

    Nothing but the inputs is kept for the backward pass.
    """
    cos, sin = rotary or (None, None)
    args = (q, k, v, cos, sin, heads, normalise, eps, dtype)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return _LinearAttention.apply(*args)
    return _forward(*args)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[:5])
        ctx.options = args[5:]
        return _forward(*args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # A backward pass may be run under autocast as well.
        with autocast.disabled(grad):
            grads = _backward(grad, *ctx.saved_tensors, *ctx.options)
        return *grads, *[None] * 6


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    normalise: bool,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    q, k = _features(q.to(dtype)), _features(k.to(dtype))
    turned_q, turned_k = (_split(_turn(x, cos, sin), heads) for x in (q, k))
    y = turned_q @ _mean_products(turned_k, _split(v.to(dtype), heads))
    if normalise:
        y = y / (_split(q, heads) @ _mean_key(k, heads) + eps)
    return _join(y)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    normalise: bool,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, of operations that can be derived again."""
    inputs = q, k, v
    q, k = _features(q.to(dtype)), _features(k.to(dtype))
    turned_q, turned_k = (_split(_turn(x, cos, sin), heads) for x in (q, k))
    v = _split(v.to(dtype), heads)
    grad = _split(grad.to(dtype), heads)
    state = _mean_products(turned_k, v)
    grad_q = grad_k = 0
    if normalise:
        mean = _mean_key(k, heads)
        split_q = _split(q, heads)
        normaliser = split_q @ mean + eps
        grad = grad / normaliser
        grad_normaliser = -(grad * (turned_q @ state)).sum(-1, keepdim=True)
        grad_normaliser = grad_normaliser / normaliser
        grad_q = _join(grad_normaliser @ mean.mT)
        grad_mean = _mean_products(split_q, grad_normaliser)
        grad_k = _join(grad_mean.mT)
    grad_state = _mean_products(turned_q, grad)
    grad_q = grad_q + _turn_back(_join(grad @ state.mT), cos, sin)
    grad_k = grad_k + _turn_back(_join(v @ grad_state.mT), cos, sin)
    grads = (
        # The derivative of the features is 1, or below 0 the features.
        grad_q * q.clamp(max=1),
        grad_k * k.clamp(max=1),
        _join(turned_k @ grad_state),
    )
    return tuple(x.to(y.dtype) for x, y in zip(grads, inputs))


def _features(x: Tensor) -> Tensor:
    """elu(x) + 1, accurate in relative terms below 0 too."""
    positive = x.relu()
    return positive + (x - positive).exp()


def _turn(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    return x if cos is None else rotate(x, cos, sin)


def _turn_back(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    return x if cos is None else rotate(x, cos, -sin)


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, L, C) -> (B, heads, L, C / heads)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _join(x: Tensor) -> Tensor:
    """(B, heads, L, C / heads) -> (B, L, C)."""
    return x.transpose(1, 2).flatten(2)


def _mean_products(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the positions (B, heads, L, ...) of outer products."""
    return a.mT @ b / a.shape[2]


def _mean_key(k: Tensor, heads: int) -> Tensor:
    """(B, L, C) -> (B, heads, C / heads, 1)."""
    return k.mean(1).unflatten(1, (heads, -1, 1))
