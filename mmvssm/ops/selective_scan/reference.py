"""The selective scan as it is defined: one position after the other."""

import torch
from torch import Tensor

from mmvssm.ops import deterministic_math


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Equation (2) of Mamba (arXiv 2312.00752) with ZOH on A, Euler on B.

    The arguments are those of :func:`mmvssm.ops.selective_scan`, with B and C
    grouped: (B, G, N, L). Gradients are autograd's.

    Returns:
        The output (B, D, L) in ``out_dtype`` and the last state (B, D, N).
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    u, delta, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = deterministic_math.softplus(delta)
    channels_per_group = u.shape[1] // B.shape[1]
    B = B.repeat_interleave(channels_per_group, dim=1)  # (B, D, N, L)
    C = C.repeat_interleave(channels_per_group, dim=1)

    h = u.new_zeros(*u.shape[:2], A.shape[1])  # (B, D, N)
    ys = []
    for u_t, dt, B_t, C_t in zip(*(x.unbind(-1) for x in (u, delta, B, C))):
        u_t, dt = u_t[:, :, None], dt[:, :, None]
        h = torch.exp(dt * A) * h + dt * B_t * u_t
        ys.append((C_t * h).sum(-1))
    y = torch.stack(ys, dim=-1)
    if D is not None:
        y = y + D.to(dtype)[:, None] * u
    if z is not None:
        y = y * deterministic_math.silu(z.to(dtype))
    return y.to(out_dtype), h
