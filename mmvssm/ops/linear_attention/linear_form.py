"""Linear attention by sums over the keys, which all queries share.

On the CPU the positions are divided into blocks. So intermediate results stay in the
caches for sequences of any length.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmvssm.ops import autocast, deterministic_math
from mmvssm.ops.backends import Supplier
from mmvssm.ops.contract import Composed, Result
from mmvssm.ops.deterministic_math import matmul
from mmvssm.ops.linear_attention.declaration import AttentionInputs, AttentionOptions
from mmvssm.ops.rotary import rotate
from mmvssm.ops.typed import apply

# Values of one tensor in a block: half a megabyte in float32.
_BLOCK = 2**17


class LinearForm(Composed):
    """Time and memory grow linearly with the length; only the inputs are kept."""

    def __init__(self, supplier: Supplier):
        self.supplier = supplier

    def forward(
        self, inputs: AttentionInputs, options: AttentionOptions, keep: bool
    ) -> Result:
        """See :func:`mmvssm.ops.linear_attention`."""
        q, k, v, cos, sin = inputs
        tables = _Options(
            *(cos, sin, options.heads, options.normalise, options.eps, options.dtype)
        )
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            y = apply(_LinearAttention, q, k, v, *tables)
        else:
            y = _forward(q, k, v, tables)
        return Result((y.to(options.out_dtype),), has_nan=False)


class _Options(NamedTuple):
    cos: Tensor | None
    sin: Tensor | None
    heads: int
    normalise: bool
    eps: float
    dtype: torch.dtype


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
        cos, sin, *others = options
        ctx.save_for_backward(q, k, v, cos, sin)
        ctx.others = others
        return _forward(q, k, v, _Options(*options))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *tables = ctx.saved_tensors
        options = _Options(*tables, *ctx.others)
        # The backward pass may run under autocast, too.
        with autocast.disabled(grad):
            grads = _backward(grad, q, k, v, options)
        return *grads, *[None] * len(options)


def _forward(q: Tensor, k: Tensor, v: Tensor, options: _Options) -> Tensor:
    state, mean = _summarise(k, v, options)
    out = v.new_empty(v.shape, dtype=options.dtype)
    for block in _blocks(v):
        features, turned = _features(q, block, options)
        y = matmul(turned, state)
        if options.normalise:
            y = y / (matmul(features, mean) + options.eps)
        _write(out, block, y)
    return out


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, by operations that can be differentiated again."""
    state, mean = _summarise(k, v, options)
    grad_state, grad_mean = torch.zeros_like(state), torch.zeros_like(mean)
    grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
    for block in _blocks(v):
        features, turned = _features(q, block, options)
        grad_y = _split(grad, block, options)
        grad_features: Tensor | int = 0
        if options.normalise:
            normaliser = matmul(features, mean) + options.eps
            grad_y = grad_y / normaliser
            along = (grad_y * (matmul(turned, state))).sum(-1, keepdim=True)
            grad_normaliser = -along / normaliser
            grad_features = grad_normaliser * mean.mT
            grad_mean = grad_mean + matmul(features.mT, grad_normaliser)
        grad_state = grad_state + matmul(turned.mT, grad_y)
        grad_turned = matmul(grad_y, state.mT)
        grad_features = grad_features + _turn_back(grad_turned, block, options)
        _write(grad_q, block, grad_features * _slope(features))

    grad_state, grad_mean = grad_state / v.shape[1], grad_mean / v.shape[1]
    for block in _blocks(v):
        features, turned = _features(k, block, options)
        grad_turned = matmul(_split(v, block, options), grad_state.mT)
        grad_features = _turn_back(grad_turned, block, options) + grad_mean.mT
        _write(grad_k, block, grad_features * _slope(features))
        _write(grad_v, block, matmul(turned, grad_state))
    return grad_q, grad_k, grad_v


def _summarise(k: Tensor, v: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    """The sums over keys and values that queries need.

    Returns:
        Mean product of rotated keys and values (B, heads, C / heads, C' / heads), and
        mean key (B, heads, C / heads, 1).
    """
    # Plain numbers until the first block is added; there is always one block.
    state: Any = 0
    mean: Any = 0
    for block in _blocks(v):
        features, turned = _features(k, block, options)
        state = state + matmul(turned.mT, _split(v, block, options))
        mean = mean + features.sum(2).unsqueeze(-1)
    return state / v.shape[1], mean / v.shape[1]


def _blocks(x: Tensor) -> Iterator[slice]:
    """Positions of a sequence (B, L, C), some at a time."""
    batch, length, channels = x.shape
    if x.device.type != 'cpu' or deterministic_math.without_values(x):
        # Does not use the length: a loop over it would tie a compiled graph to one
        # size.
        yield slice(None)
        return
    size = max(64, _BLOCK // (batch * channels))
    for start in range(0, length, size):
        yield slice(start, start + size)


def _features(x: Tensor, block: slice, options: _Options) -> tuple[Tensor, Tensor]:
    """elu + 1 of some positions, and the same rotated, split into heads."""
    features = deterministic_math.elu_plus_one(x[:, block].to(options.dtype))
    turned = features
    if options.cos is not None and options.sin is not None:
        turned = rotate(features, options.cos[block], options.sin[block])
    return _to_heads(features, options.heads), _to_heads(turned, options.heads)


def _slope(features: Tensor) -> Tensor:
    """Derivative of the features: 1 above 0; below 0 the features themselves."""
    return features.clamp(max=1)


def _turn_back(x: Tensor, block: slice, options: _Options) -> Tensor:
    """Gradient of rotated features -> gradient of the features, split into heads."""
    if options.cos is None or options.sin is None:
        return x
    x = rotate(x.transpose(1, 2).flatten(2), options.cos[block], -options.sin[block])
    return _to_heads(x, options.heads)


def _split(x: Tensor, block: slice, options: _Options) -> Tensor:
    return _to_heads(x[:, block].to(options.dtype), options.heads)


def _to_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, C) -> (B, heads, L, C / heads)."""
    apart: Tensor = x.unflatten(2, (heads, -1))
    return apart.transpose(1, 2)


def _write(out: Tensor, block: slice, x: Tensor) -> None:
    """Put (B, heads, l, C / heads) into a block of (B, L, C)."""
    _to_heads(out[:, block], x.shape[1]).copy_(x)
