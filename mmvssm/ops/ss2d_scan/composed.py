"""SS2D's core, composed of other ops: the scan orders, a scan, the merge."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmvssm.ops.backends import Supplier
from mmvssm.ops.contract import Call, Composed, Result
from mmvssm.ops.cross_scan import cross_merge, take_routes
from mmvssm.ops.deterministic_math import product
from mmvssm.ops.linear.declaration import LINEAR
from mmvssm.ops.linear.op import deterministic_call
from mmvssm.ops.scan_orders import Orders, is_cross
from mmvssm.ops.scan_orders.gather import merge_orders, read_orders
from mmvssm.ops.scan_orders.tables import orders_of
from mmvssm.ops.selective_scan.declaration import (
    SELECTIVE_SCAN,
    ScanInputs,
    ScanOptions,
)
from mmvssm.ops.ss2d_scan.declaration import Ss2dInputs, Ss2dOptions


@dataclass(frozen=True)
class ComposedSs2d(Composed):
    """Reads sequences along the scan orders, scans them, and merges the results."""

    supplier: Supplier

    def forward(self, inputs: Ss2dInputs, options: Ss2dOptions, keep: bool) -> Result:
        """See :func:`mmvssm.ops.ss2d_scan`."""
        x, count = inputs.x, len(inputs.dt_projs_weight)
        maps, dtype = x.permute(0, 2, 3, 1), options.projected_dtype
        # The projections are smaller than x, so these are read along the orders.
        weight = inputs.x_proj_weight.flatten(0, 1).to(dtype)
        call = deterministic_call(maps.to(dtype), weight)
        function, arguments = LINEAR.route(call)
        (projected,) = LINEAR.outputs(call, function(*arguments))
        call = _scan_call(inputs, options, projected, self.supplier.name)
        function, arguments = SELECTIVE_SCAN.route(call)
        ys, _ = SELECTIVE_SCAN.outputs(call, function(*arguments))
        ys = ys.unflatten(1, (count, x.shape[1]))
        return Result((_merge(ys, options, (x.shape[2], x.shape[3])),), has_nan=False)


def _scan_call(
    inputs: Ss2dInputs, options: Ss2dOptions, projected: Tensor, backend: str
) -> Call:
    """The selective scan along all orders."""
    x, _, dt_projs_weight, dt_projs_bias, A, Ds = inputs
    count, _, rank = dt_projs_weight.shape
    states, orders = A.shape[1], orders_of(options.orders)
    maps = x.permute(0, 2, 3, 1)
    # At padded places projections are zero, as for a map of zeros.
    projected = projected.unflatten(-1, (count, -1))
    sequences = _read(projected.unbind(3), orders)  # (B, L, K, R + 2N)
    dt, B, C = sequences.split((rank, states, states), dim=-1)
    weight = dt_projs_weight.to(options.projected_dtype)
    scan = ScanInputs(
        u=_read([maps] * count, orders).permute(0, 2, 3, 1).flatten(1, 2),
        delta=_step_sizes(dt, weight).flatten(1, 2),
        A=A,
        B=B.permute(0, 2, 3, 1),
        C=C.permute(0, 2, 3, 1),
        D=Ds,
        delta_bias=dt_projs_bias.flatten(),
    )
    wide = torch.promote_types(x.dtype, torch.float32)
    return Call(scan, ScanOptions(True, wide), backend, states)


def _merge(ys: Tensor, options: Ss2dOptions, size: tuple[int, int]) -> Tensor:
    """The merged map of sequences (B, K, C, L)."""
    orders = orders_of(options.orders)
    y = cross_merge(ys, size) if is_cross(orders) else merge_orders(ys, orders, size)
    found: Tensor = y.to(options.out_dtype).unflatten(2, size)
    return found


def _step_sizes(low_rank: Tensor, weight: Tensor) -> Tensor:
    """Step sizes (B, K, C, L), from dt_low_rank (B, L, K, R) and weights (K, C, R)."""
    rows = low_rank.permute(2, 0, 1, 3).flatten(1, 2)
    steps = product(rows, weight.mT)  # (K, B L, C)
    apart: Tensor = steps.unflatten(1, low_rank.shape[:2])
    return apart.permute(1, 0, 3, 2)


def _read(maps: Sequence[Tensor], orders: Orders) -> Tensor:
    """Sequences (B, L, K, C) of K maps (B, H, W, C)."""
    # The published four need no table, so one graph serves maps of any size.
    return take_routes(maps) if is_cross(orders) else read_orders(maps, orders)
