"""Linear attention by sums over the keys, which all queries share."""

import torch.nn.functional as F
from torch import Tensor

from mmvssm.ops.rotary import rotate


def linear_attention_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    rotary: tuple[Tensor, Tensor] | None,
    normalise: bool,
    eps: float,
) -> Tensor:
    """See :func:`mmvssm.ops.linear_attention`."""
    length = q.shape[1]
    q, k = F.elu(q) + 1, F.elu(k) + 1
    turned = (q, k) if rotary is None else (rotate(x, *rotary) for x in (q, k))
    q_turned, k_turned, v = (_split(x, heads) for x in (*turned, v))
    y = q_turned @ (k_turned.mT @ v / length)
    if normalise:
        # (B, heads, channels, 1)
        mean = k.mean(1).unflatten(1, (heads, -1, 1))
        y = y / (_split(q, heads) @ mean + eps)
    return y.transpose(1, 2).flatten(2)


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, L, C) -> (B, heads, L, C / heads)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)
