"""The definition of linear attention, with a weight for every pair of positions."""

import torch.nn.functional as F
from torch import Tensor

from mmvssm.ops import backends
from mmvssm.ops.contract import Composed, Result
from mmvssm.ops.linear_attention.declaration import AttentionInputs, AttentionOptions
from mmvssm.ops.rotary import rotate


class ReferenceAttention(Composed):
    """The formula of :func:`mmvssm.ops.linear_attention`.

    It makes the (B, heads, L, L) matrix of weights.
    """

    supplier = backends.REFERENCE

    def forward(
        self, inputs: AttentionInputs, options: AttentionOptions, keep: bool
    ) -> Result:
        """See :func:`mmvssm.ops.linear_attention`."""
        weights = attention_weights(inputs, options)
        v = inputs.v.to(options.dtype)
        v = v.unflatten(2, (options.heads, -1)).transpose(1, 2)
        y = (weights @ v).transpose(1, 2).flatten(2)
        return Result((y.to(options.out_dtype),), has_nan=False)


def attention_weights(inputs: AttentionInputs, options: AttentionOptions) -> Tensor:
    """The weight of every value for every query, (B, heads, L, L)."""
    q, k = (x.to(options.dtype) for x in inputs[:2])
    q, k = F.elu(q) + 1, F.elu(k) + 1
    turned = (q, k)
    cos, sin = inputs.cos, inputs.sin
    if cos is not None and sin is not None:
        turned = (rotate(q, cos, sin), rotate(k, cos, sin))
    weights = products(*turned, options.heads) / q.shape[1]
    if options.normalise:
        mean = products(q, k, options.heads).mean(-1, keepdim=True)
        weights = weights / (mean + options.eps)
    return weights


def products(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Inner products (B, heads, L, L) of all queries (B, L, C) with all keys."""
    q, k = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k))
    return q @ k.mT
