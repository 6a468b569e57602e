"""SS2D's core by Triton kernels: one scan after the other, in the image's order.

The kernels of the selective scan read the map and the projections along a scan
order, by index arithmetic or by a table, and add to the merged map, so there is
never an array with all scans, forward or backward. Scans follow one another on the
device, and each writes every place once: the same inputs give the same bits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mmvssm.ops import checks
from mmvssm.ops.scan_orders import KernelOrders
from mmvssm.ops.selective_scan import triton_plan
from mmvssm.ops.selective_scan.triton_backend import scan_backward, scan_forward
from mmvssm.ops.selective_scan.triton_plan import (
    Inputs,
    Plan,
    low_rank_gradients,
    low_rank_steps,
)
from mmvssm.ops.ss2d_scan.per_order import (
    OrderGradients,
    OrderInputs,
    join_gradients,
    sequence,
    split_orders,
)

# Of the map and its projections.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def saved_states_shape(
    orders: int, batch: int, positions: int, states: int, channels: int
) -> tuple[int, ...]:
    """Shape of what forward keeps: of each scan the states before its chunks."""
    shape = triton_plan.saved_states_shape(batch, positions, states, channels)
    return (orders, *shape)


def _scans(
    inputs: tuple[Tensor, ...], orders: KernelOrders, backward: bool
) -> Iterator[tuple[Plan, Inputs, OrderInputs]]:
    """Of every order the plan and the inputs of its scan."""
    height, states = inputs[0].shape[1], inputs[4].shape[1]
    for k, own in enumerate(split_orders(*inputs)):
        delta, weight = low_rank_steps(own.dt, own.weight, states)
        scan = Inputs(
            *(own.u, delta, own.A, own.B, own.C, own.D, None, own.bias), weight
        )
        walked = dict(height=height, route=orders.route(k), table=orders.row(k))
        yield Plan.of(scan, True, backward=backward, **walked), scan, own


def _running_sum(out: Tensor, orders: KernelOrders) -> list[Tensor]:
    """Where each scan leaves the sum so far: in float32, and then in ``out``."""
    sums = out
    if out.dtype != torch.float32:
        sums = torch.empty_like(out, dtype=torch.float32)
    return [sequence(sums)] * (len(orders.routes) - 1) + [sequence(out)]


def forward(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    orders: KernelOrders,
    out_dtype: torch.dtype,
    keep_states: bool,
) -> tuple[Tensor, Tensor | None, bool]:
    """See :func:`mmvssm.ops.ss2d_scan.fused.ss2d_scan_fused`.

    Returns:
        The merged map (B, H, W, C), with ``keep_states`` the states before the
        chunks, and whether there is NaN.
    """
    batch, height, width, channels = x.shape
    out = torch.empty_like(x, dtype=out_dtype)
    saved = None
    if keep_states:
        positions = orders.positions(height * width)
        sizes = (len(dt_weight), batch, positions, A.shape[1], channels)
        saved = x.new_empty(saved_states_shape(*sizes), dtype=torch.float32)
    sums = _running_sum(out, orders)
    scans = _scans((x, projected, dt_weight, dt_bias, A, Ds), orders, backward=False)
    for k, (plan, inputs, _) in enumerate(scans):
        added = None if k == 0 else sums[k - 1]
        kept = None if saved is None else saved[k]
        scan_forward(plan, inputs, sums[k], added=added, saved=kept)
    return out, saved, checks.has_nan(out)


def backward(
    grad_out: Tensor,
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    orders: KernelOrders,
    saved: Tensor,
) -> list[Tensor]:
    """Gradients of the inputs of :func:`forward`, contiguous.

    Args:
        grad_out: Gradient of the merged map (B, H, W, C), contiguous.
        saved: The second result of :func:`forward`.
    """
    grad_x = torch.empty_like(x)
    sums = _running_sum(grad_x, orders)
    gradients = []
    scans = _scans((x, projected, dt_weight, dt_bias, A, Ds), orders, backward=True)
    for k, (plan, inputs, (_, dt, _, _, weight, *_)) in enumerate(scans):
        grads = scan_backward(
            *(plan, inputs, saved[k], sequence(grad_out)),
            grad_u=sums[k],
            grad_delta=x.new_empty(dt.shape[:2] + x.shape[3:], dtype=dt.dtype).mT,
            added=None if k == 0 else sums[k - 1],
        )
        by_dt, by_weight = low_rank_gradients(grads.delta, dt, weight)
        gradients.append(
            OrderGradients(
                *(by_dt, grads.B[:, 0].mT, grads.C[:, 0].mT),
                *(by_weight, grads.delta_bias, grads.A, grads.D),
            )
        )
    return [grad_x, *join_gradients(projected, gradients)]
