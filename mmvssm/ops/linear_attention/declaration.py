"""Declaration of linear attention."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmvssm.ops.contract import Flops
from mmvssm.ops.operator import Op


class AttentionInputs(NamedTuple):
    """Inputs of linear attention, or their gradients.

    Attributes:
        q, k: (B, L, C).
        v: (B, L, C').
        cos, sin: Tables of the rotation (L, C / 2), without gradient, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor | None = None
    sin: Tensor | None = None


class AttentionOptions(NamedTuple):
    """Options of linear attention.

    Attributes:
        heads: Number of heads.
        normalise: Divide by the normaliser.
        eps: Added to the normaliser.
        dtype: Dtype of the computation.
        out_dtype: Dtype of the result.
    """

    heads: int
    normalise: bool
    eps: float
    dtype: torch.dtype
    out_dtype: torch.dtype


def _outputs_like(
    inputs: AttentionInputs, options: AttentionOptions
) -> tuple[Tensor, ...]:
    return (inputs.v.new_empty(inputs.v.shape, dtype=options.out_dtype),)


def _flops(shapes: AttentionInputs, options: AttentionOptions) -> list[Flops]:
    batch, length, channels = shapes.q
    # Products of keys and values, of queries and these, of queries and the mean key.
    by_channel = 2 * shapes.v[2] // options.heads + options.normalise
    return [Flops(batch * length * channels * by_channel)]


LINEAR_ATTENTION = Op(
    'linear_attention',
    AttentionInputs,
    AttentionOptions,
    returns=('y',),
    saves=1,
    outputs_like=_outputs_like,
    flops=_flops,
    axes=dict(q=(0, 1), k=(0, 1), v=(0, 1), cos=(None, 0), sin=(None, 0)),
)
