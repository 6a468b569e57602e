"""The bidirectional scan as it is defined: flip, scan, flip back."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvssm.ops import deterministic_math
from mmvssm.ops.bidirectional_scan.direction import Direction
from mmvssm.ops.selective_scan.reference import selective_scan_reference


def bidirectional_scan_reference(
    x: Tensor,
    z: Tensor,
    forward: Direction,
    backward: Direction,
    average: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Algorithm 1 of Vim (arXiv 2401.09417), lines 6 to 19.

    The arguments are those of :func:`mmvssm.ops.bidirectional_scan`.
    Everything is computed in float32, or float64 for float64 input.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, z = x.to(dtype), z.to(dtype)
    forward, backward = (
        Direction(*(t.to(dtype) for t in direction))
        for direction in (forward, backward)
    )
    y = _one_direction(x, z, forward)
    y = y + _one_direction(x.flip(-1), z.flip(-1), backward).flip(-1)
    return (y / 2 if average else y).to(out_dtype)


def _one_direction(x: Tensor, z: Tensor, weights: Direction) -> Tensor:
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
    y, _ = selective_scan_reference(
        u,
        weights.dt_proj_weight @ dt,
        weights.A,
        B.unsqueeze(1),
        C.unsqueeze(1),
        weights.D,
        z,
        weights.dt_proj_bias,
        True,
        u.dtype,
    )
    return y
