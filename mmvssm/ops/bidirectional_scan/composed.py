"""The bidirectional scan out of one selective scan over both directions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvssm.ops import autocast, deterministic_math
from mmvssm.ops.bidirectional_scan.direction import Direction
from mmvssm.ops.linear.op import deterministic_linear
from mmvssm.ops.selective_scan.op import scan


def bidirectional_scan_composed(
    x: Tensor,
    z: Tensor,
    forward: Direction,
    backward: Direction,
    average: bool,
    backend: str,
) -> Tensor:
    """See :func:`mmvssm.ops.bidirectional_scan`; ``backend`` is the scan's.

    Convolutions and projections of both directions read the sequence as it is.
    The two then go through a single scan as two groups of channels, of which
    the second runs from the end, and are gated after they are added up: both
    have the gate of their position, so it is a common factor.
    """
    channels = x.shape[1]
    ways = (
        _prepare(x.mT, forward, from_end=False),
        _prepare(x.mT, backward, from_end=True),
    )
    # (B, L, 2, ...)
    u, delta, B, C = (torch.stack(pair, dim=2) for pair in zip(*ways))
    A, D, bias = (
        torch.cat((getattr(forward, name), getattr(backward, name)))
        for name in ('A', 'D', 'dt_proj_bias')
    )
    ys, _ = scan(
        u.flatten(2).mT,
        delta.flatten(2).mT,
        A,
        B.permute(0, 2, 3, 1),
        C.permute(0, 2, 3, 1),
        D,
        None,
        bias,
        True,
        float32_out=True,
        backend=backend,
    )
    y, y_from_end = ys.split(channels, dim=1)
    gate = deterministic_math.silu(z.to(ys.dtype))
    if average:
        gate = gate / 2
    y = (y + y_from_end.flip(-1)) * gate
    return y if autocast.is_enabled(x) else y.to(x.dtype)


def _prepare(x: Tensor, weights: Direction, from_end: bool) -> tuple[Tensor, ...]:
    """What the scan of one direction reads, along that direction.

    Args:
        x: Sequence (B, L, D).
        weights: Those of the direction.
        from_end: Whether it starts at the last position.

    Returns:
        u and delta (B, L, D), B and C (B, L, N).
    """
    rank, states = weights.dt_proj_weight.shape[1], weights.A.shape[1]
    u = deterministic_math.silu(_convolve(x, weights, from_end)).to(x.dtype)
    dt, B, C = deterministic_linear(u, weights.x_proj_weight).split(
        (rank, states, states), dim=-1
    )
    inputs = (u, deterministic_linear(dt, weights.dt_proj_weight), B, C)
    return tuple(t.flip(1) for t in inputs) if from_end else inputs


def _convolve(x: Tensor, weights: Direction, from_end: bool) -> Tensor:
    """Depthwise convolution along the direction, in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    length, width = x.shape[1], weights.conv_weight.shape[1]
    taps = weights.conv_weight.to(dtype).unbind(1)
    if from_end:
        taps = taps[::-1]
    padding = (0, width - 1) if from_end else (width - 1, 0)
    padded = F.pad(x.to(dtype), (0, 0, *padding))
    # Shifted products keep the channels last in memory.
    out = weights.conv_bias.to(dtype)
    for shift, tap in enumerate(taps):
        out = out + padded[:, shift : shift + length] * tap
    return out
