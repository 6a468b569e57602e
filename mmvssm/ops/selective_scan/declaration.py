"""Declaration of the selective scan."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmvssm.ops.contract import Flops
from mmvssm.ops.operator import Op


class ScanInputs(NamedTuple):
    """Inputs of a selective scan, or their gradients.

    Attributes:
        u: (B, D, L).
        delta: Step sizes before bias and softplus (B, D, L).
        A: Decay rates (D, N).
        B, C: (B, G, N, L).
        D: Skip weights (D,) or None.
        z: Gate (B, D, L) or None.
        delta_bias: (D,) or None.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    delta_bias: Tensor | None = None


class ScanOptions(NamedTuple):
    """Options of a selective scan.

    Attributes:
        delta_softplus: Whether softplus is applied to the step sizes.
        out_dtype: Dtype of the output.
        return_last_state: Whether the caller wants the last state, too.
    """

    delta_softplus: bool
    out_dtype: torch.dtype
    return_last_state: bool = False


def scan_flops(
    batch: int,
    channels: int,
    length: int,
    states: int,
    skip: bool = True,
    gate: bool = False,
) -> int:
    """FLOPs of one selective scan, 9BLDN + BDL [skip] + BDL [gate]."""
    return batch * channels * length * (9 * states + skip + gate)


def outputs_like(inputs: ScanInputs, options: ScanOptions) -> tuple[Tensor, Tensor]:
    """Memory for the output, with u's strides, and the last state (B, D, N)."""
    u = inputs.u
    batch, channels, _ = u.shape
    dtype = torch.promote_types(u.dtype, torch.float32)
    state = u.new_empty(batch, channels, inputs.A.shape[1], dtype=dtype)
    return torch.empty_like(u, dtype=options.out_dtype), state


def _flops(shapes: ScanInputs, options: ScanOptions) -> list[Flops]:
    batch, channels, length = shapes.u
    _, states = shapes.A
    skip, gate = shapes.D is not None, shapes.z is not None
    return [Flops(0, scan_flops(batch, channels, length, states, skip, gate))]


SELECTIVE_SCAN = Op(
    'selective_scan',
    ScanInputs,
    ScanOptions,
    returns=('out', 'last_state'),
    saves=1,
    outputs_like=outputs_like,
    flops=_flops,
    axes=dict(u=(0, 2), delta=(0, 2), B=(0, 3), C=(0, 3), z=(0, 2)),
)
