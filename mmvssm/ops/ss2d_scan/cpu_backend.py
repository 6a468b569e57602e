"""SS2D's core by compiled CPU kernels: all scans and their merge in one pass."""

from ctypes import Array, c_int32
from functools import lru_cache

import torch
from torch import Tensor

from mmvssm.ops.cpu import library
from mmvssm.ops.cpu.library import Ss2dProblem
from mmvssm.ops.scan_orders import KernelOrders
from mmvssm.ops.structures import pointer

# Of the map and its projections.
DTYPES = (torch.float32,)


def saved_states_shape(
    orders: int, batch: int, positions: int, states: int, channels: int
) -> tuple[int, int, int, int, int]:
    """Shape of what forward keeps: of each scan the states before its tiles."""
    return (orders, -(-positions // library.tile()) - 1, batch, states, channels)


def _problem(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    orders: KernelOrders,
    **results: Tensor | None,
) -> Ss2dProblem:
    """What the kernels are told of a call; its tensors must outlive it."""
    batch, height, width, channels = x.shape
    return Ss2dProblem(
        batch=batch,
        channels=channels,
        height=height,
        width=width,
        states=A.shape[1],
        rank=dt_weight.shape[2],
        orders=len(orders.routes),
        positions=orders.positions(height * width),
        routes=_numbers(orders.routes),
        table=pointer(orders.table),
        x=pointer(x),
        projected=pointer(projected),
        projected_stride=projected.stride(2),
        dt_weight=pointer(dt_weight),
        dt_bias=pointer(dt_bias),
        A=pointer(A),
        D=pointer(Ds),
        **{name: pointer(x) for name, x in results.items()},
    )


@lru_cache
def _numbers(routes: tuple[int, ...]) -> Array:
    """As an array of C."""
    return (c_int32 * len(routes))(*routes)


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
        tiles, and whether there is NaN.
    """
    batch, height, width, channels = x.shape
    out = torch.empty_like(x, dtype=out_dtype)
    saved = None
    if keep_states:
        positions = orders.positions(height * width)
        sizes = (len(dt_weight), batch, positions, A.shape[1], channels)
        saved = x.new_empty(saved_states_shape(*sizes))
    inputs = (x, projected, dt_weight, dt_bias, A, Ds)
    problem = _problem(*inputs, orders, out=out, saved=saved)
    return out, saved, library.call('ss2d_forward', problem)


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
    batch, height, width, channels = x.shape
    count, _, rank = dt_weight.shape
    states = A.shape[1]
    strips = library.strips(channels)
    columns = count * (rank + 2 * states)
    grad_x = torch.empty_like(x)
    grad_projected = x.new_empty(strips, batch, height, width, columns)
    grad_weight = x.new_empty(batch, count, rank, channels)
    grad_bias, grad_D = (x.new_empty(batch, count, channels) for _ in range(2))
    grad_A = x.new_empty(batch, count, states, channels)
    problem = _problem(
        *(x, projected, dt_weight, dt_bias, A, Ds, orders),
        saved=saved,
        grad_out=grad_out,
        grad_x=grad_x,
        grad_projected=grad_projected,
        grad_dt_weight=grad_weight,
        grad_dt_bias=grad_bias,
        grad_A=grad_A,
        grad_D=grad_D,
    )
    library.call('ss2d_backward', problem)
    return [
        grad_x,
        grad_projected.sum(0),
        grad_weight.sum(0).mT.contiguous(),
        grad_bias.sum(0),
        grad_A.sum(0).mT.reshape(A.shape),
        grad_D.sum(0).flatten(),
    ]
