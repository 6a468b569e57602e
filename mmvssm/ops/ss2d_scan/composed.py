"""SS2D's core out of the other ops: the scan orders, a scan, the merge."""

from collections.abc import Sequence

from torch import Tensor

from mmvssm.ops import autocast
from mmvssm.ops.cross_scan import cross_merge, take_routes
from mmvssm.ops.deterministic_math import product
from mmvssm.ops.scan_orders import DEFAULT, Orders, is_cross
from mmvssm.ops.scan_orders.gather import merge_orders, read_orders
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
    orders: Orders = DEFAULT,
) -> Tensor:
    """See :func:`mmvssm.ops.ss2d_scan`; ``backend`` is that of the scan."""
    count, channels, rank = dt_projs_weight.shape
    size, states = x.shape[2:], A.shape[1]
    maps = x.permute(0, 2, 3, 1)

    # The projections are smaller than x: they are what is read along the orders.
    # At padded places they are zero, as those of a map of zeros are.
    projected = project_map(maps, x_proj_weight).unflatten(-1, (count, -1))
    sequences = _read(projected.unbind(3), orders)  # (B, L, K, R + 2N)
    dt, B, C = sequences.split((rank, states, states), dim=-1)
    delta = _step_sizes(dt, dt_projs_weight)
    ys, _ = scan(
        _read([maps] * count, orders).permute(0, 2, 3, 1).flatten(1, 2),
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
    ys = ys.unflatten(1, (count, channels))
    y = cross_merge(ys, size) if is_cross(orders) else merge_orders(ys, orders, size)
    if not autocast.is_enabled(x):
        y = y.to(x.dtype)
    return y.unflatten(2, size)


def _step_sizes(low_rank: Tensor, weight: Tensor) -> Tensor:
    """Step sizes (B, K, C, L) of a low rank (B, L, K, R), by weights (K, C, R)."""
    if autocast.is_enabled(low_rank):
        weight = weight.to(low_rank.dtype)
    rows = low_rank.permute(2, 0, 1, 3).flatten(1, 2)
    steps = product(rows, weight.mT)  # (K, B L, C)
    return steps.unflatten(1, low_rank.shape[:2]).permute(1, 0, 3, 2)


def _read(maps: Sequence[Tensor], orders: Orders) -> Tensor:
    """Sequences (B, L, K, C) of K maps (B, H, W, C)."""
    # Without a table for the published four, whose maps may be of any size.
    return take_routes(maps) if is_cross(orders) else read_orders(maps, orders)
