"""The definition of the selective scan: one position after the other."""

import torch

from mmvssm.ops import backends, deterministic_math
from mmvssm.ops.contract import Composed, Result
from mmvssm.ops.selective_scan.declaration import ScanInputs, ScanOptions


class ReferenceScan(Composed):
    """Equation (2) of Mamba (arXiv 2312.00752) with ZOH on A, Euler on B.

    In float32, or float64 for float64 inputs.
    """

    supplier = backends.REFERENCE

    def forward(self, inputs: ScanInputs, options: ScanOptions, keep: bool) -> Result:
        """See :func:`mmvssm.ops.selective_scan`; B and C are (B, G, N, L)."""
        u, delta, A, B, C, D, z, delta_bias = inputs
        dtype = torch.promote_types(u.dtype, torch.float32)
        u, delta, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
        if delta_bias is not None:
            delta = delta + delta_bias.to(dtype)[:, None]
        if options.delta_softplus:
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
        return Result((y.to(options.out_dtype), h))
