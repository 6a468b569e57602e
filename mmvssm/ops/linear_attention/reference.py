"""Linear attention as it is defined, with a weight for every two positions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvssm.ops.rotary import rotate


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    rotary: tuple[Tensor, Tensor] | None,
    normalise: bool,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """The formula of :func:`mmvssm.ops.linear_attention`, whose arguments it has.

    It makes the (B, heads, L, L) matrix of weights. ``dtype`` is that of the
    result, and of everything on the way.
    """
    length = q.shape[1]
    q, k, v = (x.to(dtype) for x in (q, k, v))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    turned = (q, k) if rotary is None else (rotate(x, *rotary) for x in (q, k))
    weights = _products(*turned, heads) / length
    if normalise:
        weights = weights / (_products(q, k, heads).mean(-1, keepdim=True) + eps)
    v = v.unflatten(2, (heads, -1)).transpose(1, 2)
    return (weights @ v).transpose(1, 2).flatten(2)


def _products(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Inner products (B, heads, L, L) of all queries with all keys."""
    q, k = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k))
    return q @ k.mT
