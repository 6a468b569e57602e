"""Declaration of the linear layer."""

from math import prod
from typing import NamedTuple

from torch import Tensor

from mmvssm.ops.contract import Flops
from mmvssm.ops.operator import Op


class LinearInputs(NamedTuple):
    """Inputs of a linear layer.

    Attributes:
        x: (..., K).
        weight: (N, K).
        bias: (N,) or None.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None


class LinearOptions(NamedTuple):
    """Options of a linear layer.

    Attributes:
        deterministic: Whether the bits must not depend on the number of threads, in any
            dtype, even if that is slower.
    """

    deterministic: bool


def _outputs_like(inputs: LinearInputs, options: LinearOptions) -> tuple[Tensor, ...]:
    x, weight, _ = inputs
    return (x.new_empty(*x.shape[:-1], weight.shape[0]),)


def _flops(shapes: LinearInputs, options: LinearOptions) -> list[Flops]:
    rows, _ = shapes.weight
    return [Flops(prod(shapes.x) * rows)]


LINEAR = Op(
    'linear',
    LinearInputs,
    LinearOptions,
    returns=('y',),
    outputs_like=_outputs_like,
    flops=_flops,
    axes=dict(x=(0, -2)),
)
