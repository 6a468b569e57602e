"""Linear attention as an op: what goes in, what comes out."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmvssm.ops.contract import Flops
from mmvssm.ops.operator import Op


class AttentionInputs(NamedTuple):
    """Inputs of a linear attention, or their gradients.

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
    """Options of a linear attention.

    Attributes:
        heads: Number of heads.
        normalise: Divide by the normaliser.
        eps: Added to the normaliser.
        dtype: In which all is computed.
        out_dtype: Of the result.
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
    # Keys with values, queries with those, and queries with the mean key.
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
