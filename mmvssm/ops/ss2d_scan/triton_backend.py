"""SS2D's core by Triton kernels: one route after the other, in the image's order.

The kernels of the selective scan read the map and the projections along a route
by index arithmetic and add to the merged map, so there is never an array with
all four routes, forward or backward. Routes follow one another on the device,
and each writes every position once: the same inputs give the same bits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mmvssm.ops import checks
from mmvssm.ops.cross_scan import NUM_ROUTES
from mmvssm.ops.selective_scan import triton_plan
from mmvssm.ops.selective_scan.triton_backend import scan_backward, scan_forward
from mmvssm.ops.selective_scan.triton_plan import (
    Inputs,
    Plan,
    low_rank_gradients,
    low_rank_steps,
)

# Of the map and its projections.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def saved_states_shape(
    batch: int, length: int, states: int, channels: int
) -> tuple[int, ...]:
    """Shape of what forward keeps: of each route the states before its chunks."""
    shape = triton_plan.saved_states_shape(batch, length, states, channels)
    return (NUM_ROUTES, *shape)


def _sequence(x: Tensor) -> Tensor:
    """A map (B, H, W, C) as (B, C, H W) in the order of the image."""
    return x.flatten(1, 2).mT


def _routes(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    backward: bool,
) -> Iterator[tuple[Plan, Inputs, Tensor]]:
    """Of every route the plan, the inputs of its scan and the low-rank steps."""
    rank, states = dt_weight.shape[2], A.shape[1]
    A, Ds = A.unflatten(0, (NUM_ROUTES, -1)), Ds.unflatten(0, (NUM_ROUTES, -1))
    pieces = projected.flatten(1, 2).chunk(NUM_ROUTES, dim=2)
    for k, piece in enumerate(pieces):
        dt, B, C = piece.split((rank, states, states), dim=2)
        delta, delta_weight = low_rank_steps(dt, dt_weight[k], states)
        B, C = B.mT.unsqueeze(1), C.mT.unsqueeze(1)
        inputs = Inputs(
            *(_sequence(x), delta, A[k], B, C, Ds[k], None, dt_bias[k], delta_weight)
        )
        plan = Plan.of(inputs, True, backward=backward, height=x.shape[1], route=k)
        yield plan, inputs, dt


def _running_sum(out: Tensor) -> list[Tensor]:
    """Where each route leaves the sum so far: in float32, and then in ``out``."""
    sums = out
    if out.dtype != torch.float32:
        sums = torch.empty_like(out, dtype=torch.float32)
    return [_sequence(sums)] * (NUM_ROUTES - 1) + [_sequence(out)]


def forward(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
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
        shape = saved_states_shape(batch, height * width, A.shape[1], channels)
        saved = x.new_empty(shape, dtype=torch.float32)
    sums = _running_sum(out)
    routes = _routes(x, projected, dt_weight, dt_bias, A, Ds, False)
    for k, (plan, inputs, _) in enumerate(routes):
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
    saved: Tensor,
) -> list[Tensor]:
    """Gradients of the inputs of :func:`forward`, contiguous.

    Args:
        grad_out: Gradient of the merged map (B, H, W, C), contiguous.
        saved: The second result of :func:`forward`.
    """
    grad_x = torch.empty_like(x)
    sums = _running_sum(grad_x)
    columns, parameters = [], []
    routes = _routes(x, projected, dt_weight, dt_bias, A, Ds, True)
    for k, (plan, inputs, dt) in enumerate(routes):
        grads = scan_backward(
            *(plan, inputs, saved[k], _sequence(grad_out)),
            grad_u=sums[k],
            grad_delta=x.new_empty(dt.shape[:2] + x.shape[3:], dtype=dt.dtype).mT,
            added=None if k == 0 else sums[k - 1],
        )
        by_dt, by_weight = low_rank_gradients(grads.delta, dt, dt_weight[k])
        columns += [by_dt, grads.B[:, 0].mT, grads.C[:, 0].mT]
        parameters.append((by_weight, grads.delta_bias, grads.A, grads.D))
    grad_weight, grad_bias, grad_A, grad_D = map(torch.stack, zip(*parameters))
    columns = [column.to(projected.dtype) for column in columns]
    return [
        grad_x,
        torch.cat(columns, dim=2).view(projected.shape),
        grad_weight,
        grad_bias,
        grad_A.flatten(0, 1),
        grad_D.flatten(),
    ]
