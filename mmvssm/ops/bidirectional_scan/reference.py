"""The definition of the bidirectional scan: flip, scan, flip back."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvssm.ops import backends, deterministic_math
from mmvssm.ops.bidirectional_scan.declaration import (
    BidirectionalInputs,
    BidirectionalOptions,
)
from mmvssm.ops.bidirectional_scan.direction import Direction
from mmvssm.ops.contract import Composed, Result
from mmvssm.ops.selective_scan.declaration import ScanInputs, ScanOptions
from mmvssm.ops.selective_scan.reference import ReferenceScan


class ReferenceBidirectional(Composed):
    """Algorithm 1 of Vim (arXiv 2401.09417), lines 6 to 19.

    In float32, or float64 for float64 input.
    """

    supplier = backends.REFERENCE

    def forward(
        self, inputs: BidirectionalInputs, options: BidirectionalOptions, keep: bool
    ) -> Result:
        """See :func:`mmvssm.ops.bidirectional_scan`."""
        dtype = torch.promote_types(inputs.x.dtype, torch.float32)
        x, z = inputs.x.to(dtype), inputs.z.to(dtype)
        forward, backward = (
            Direction(*(t.to(dtype) for t in direction)) for direction in inputs[2:]
        )
        y = _one_direction(x, z, forward)
        y = y + _one_direction(x.flip(-1), z.flip(-1), backward).flip(-1)
        return Result(((options.scale * y).to(options.out_dtype),))


def _one_direction(x: Tensor, z: Tensor, weights: Direction) -> Tensor:
    inputs = direction_scan(x, weights)._replace(z=z)
    options = ScanOptions(delta_softplus=True, out_dtype=x.dtype)
    return ReferenceScan().forward(inputs, options, False).outputs[0]


def direction_scan(x: Tensor, weights: Direction) -> ScanInputs:
    """The selective scan, with softplus and without gate, of one direction.

    Args:
        x: Sequence (B, D, L) in the order of the scan, float32 or float64.
        weights: Of the direction, in the same dtype.
    """
    channels, width = weights.conv_weight.shape
    rank, states = weights.dt_proj_weight.shape[1], weights.A.shape[1]
    u = F.conv1d(
        F.pad(x, (width - 1, 0)),
        weights.conv_weight.unsqueeze(1),
        weights.conv_bias,
        groups=channels,
    )
    u = deterministic_math.silu(u)
    dt, B, C = (weights.x_proj_weight @ u).split((rank, states, states), dim=1)
    return ScanInputs(
        u=u,
        delta=weights.dt_proj_weight @ dt,
        A=weights.A,
        B=B.unsqueeze(1),
        C=C.unsqueeze(1),
        D=weights.D,
        delta_bias=weights.dt_proj_bias,
    )
