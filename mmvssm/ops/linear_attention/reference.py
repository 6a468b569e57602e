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
        q, k, v = (x.to(options.dtype) for x in inputs[:3])
        cos, sin, heads = inputs.cos, inputs.sin, options.heads
        q, k = F.elu(q) + 1, F.elu(k) + 1
        turned = (q, k)
        if cos is not None and sin is not None:
            turned = (rotate(q, cos, sin), rotate(k, cos, sin))
        weights = _products(*turned, heads) / q.shape[1]
        if options.normalise:
            mean = _products(q, k, heads).mean(-1, keepdim=True)
            weights = weights / (mean + options.eps)
        v = v.unflatten(2, (heads, -1)).transpose(1, 2)
        y = (weights @ v).transpose(1, 2).flatten(2)
        return Result((y.to(options.out_dtype),), has_nan=False)


def _products(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Inner products (B, heads, L, L) of all queries with all keys."""
    q, k = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k))
    return q @ k.mT
