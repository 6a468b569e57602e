"""SS2D's core out of the other ops: the routes, a scan, the merge."""

import torch
from torch import Tensor

from mmvssm.ops import autocast
from mmvssm.ops.cross_scan import NUM_ROUTES, cross_merge, cross_scan, take_routes
from mmvssm.ops.selective_scan.op import scan
from mmvssm.ops.ss2d_scan.project import project_map


def ss2d_scan_composed(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    backend: str,
) -> Tensor:
    """See :func:`mmvssm.ops.ss2d_scan`; ``backend`` is that of the scan."""
    batch, channels, height, width = x.shape
    rank, states = dt_projs_weight.shape[2], A.shape[1]

    # The projections are smaller than x: they are what is read along the routes.
    projected = project_map(x.permute(0, 2, 3, 1), x_proj_weight, backend)
    projected = projected.unflatten(-1, (NUM_ROUTES, -1))
    sequences = take_routes(projected.unbind(3))  # (B, L, 4, R + 2N)
    dt, B, C = sequences.split((rank, states, states), dim=-1)
    delta = torch.einsum('blkr,kcr->bkcl', dt, dt_projs_weight)
    ys, _ = scan(
        cross_scan(x).flatten(1, 2),
        delta.flatten(1, 2),
        A,
        B.permute(0, 2, 3, 1),
        C.permute(0, 2, 3, 1),
        Ds,
        None,
        dt_projs_bias.flatten(),
        True,
        float32_out=True,
        backend=backend,
    )
    y = cross_merge(ys.unflatten(1, (NUM_ROUTES, channels)), (height, width))
    if not autocast.is_enabled(x):
        y = y.to(x.dtype)
    return y.unflatten(2, (height, width))
