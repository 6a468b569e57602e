"""SS2D's core by own CUDA kernels: one scan after the other, in the image's order.

The kernels of the selective scan read the map and the projections along a scan
order, by index arithmetic or by a table, and add to the merged map, so there is
never an array with all scans, forward or backward. The forward kernels make the
step sizes of their low-rank form on the way, unless its rank is high. Scans follow
one another on the device, and each writes every place once: the same inputs give
the same bits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mmvssm.ops import checks
from mmvssm.ops.cuda import library
from mmvssm.ops.deterministic_math import linear_product
from mmvssm.ops.scan_orders import KernelOrders
from mmvssm.ops.selective_scan import cuda_backend as scan
from mmvssm.ops.selective_scan.cuda_backend import Scan
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
    return (orders, *scan.saved_states_shape(batch, positions, states, channels))


def _scans(
    inputs: tuple[Tensor, ...], orders: KernelOrders, low_rank: bool
) -> Iterator[tuple[Scan, OrderInputs]]:
    """Of every order the inputs of its scan."""
    width = inputs[0].shape[2]
    for k, own in enumerate(split_orders(*inputs)):
        scan_inputs = Scan(
            *(own.u, own.A, own.B, own.C),
            **dict(D=own.D, bias=own.bias, width=width),
            **dict(route=orders.route(k), table=orders.row(k)),
        )
        if low_rank:
            scan_inputs.features, scan_inputs.weight = own.dt.mT, own.weight
        else:
            scan_inputs.delta = linear_product(own.dt.float(), own.weight).mT
        yield scan_inputs, own


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
    rank, states = dt_weight.shape[2], A.shape[1]
    out = torch.empty_like(x, dtype=torch.float32)
    saved = None
    if keep_states:
        positions = orders.positions(height * width)
        sizes = (len(dt_weight), batch, positions, states, channels)
        saved = x.new_empty(saved_states_shape(*sizes), dtype=torch.float32)
    low_rank = rank <= library.MAX_RANK and states <= library.MAX_RANK_STATES
    scans = _scans((x, projected, dt_weight, dt_bias, A, Ds), orders, low_rank)
    for k, (inputs, _) in enumerate(scans):
        kept = None if saved is None else saved[k]
        scan.scan_forward(inputs, sequence(out), saved=kept, add=k > 0)
    return out.to(out_dtype), saved, checks.has_nan(out)


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
    grad_x = torch.empty_like(x, dtype=torch.float32)
    gradients = []
    given = (x, projected, dt_weight, dt_bias, A, Ds)
    scans = _scans(given, orders, low_rank=False)
    for k, (inputs, (_, dt, _, _, weight, *_)) in enumerate(scans):
        grad_delta = torch.empty_like(inputs.delta)
        grad_A, grad_B, grad_C, grad_D, grad_bias = scan.scan_backward(
            *(inputs, saved[k], sequence(grad_out), None),
            rows=(sequence(grad_x), grad_delta, None),
            add=k > 0,
        )
        grad_weight = linear_product(
            grad_delta.transpose(0, 1).flatten(1), dt.float().flatten(0, 1).t()
        )
        gradients.append(
            OrderGradients(
                linear_product(grad_delta.mT, weight.t()),
                *(grad_B[:, 0], grad_C[:, 0]),
                *(grad_weight, grad_bias, grad_A, grad_D),
            )
        )
    return [grad_x.to(x.dtype), *join_gradients(projected, gradients)]
