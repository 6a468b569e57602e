"""SS2D's core by compiled CPU kernels: four routes and their merge in one pass."""

import torch
from torch import Tensor

from mmvssm.ops.cpu import library
from mmvssm.ops.cpu.library import Ss2dProblem
from mmvssm.ops.cross_scan import NUM_ROUTES
from mmvssm.ops.structures import pointer

# Of the map and its projections.
DTYPES = (torch.float32,)


def saved_states_shape(
    batch: int, length: int, states: int, channels: int
) -> tuple[int, int, int, int, int]:
    """Shape of what forward keeps: of each route the states before its tiles."""
    return (NUM_ROUTES, -(-length // library.tile()) - 1, batch, states, channels)


def _sizes(x: Tensor, dt_weight: Tensor, A: Tensor) -> tuple[int, ...]:
    batch, height, width, channels = x.shape
    return batch, channels, height, width, A.shape[1], dt_weight.shape[2]


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
        tiles, and whether there is NaN.
    """
    batch, channels, height, width, states, _ = sizes = _sizes(x, dt_weight, A)
    out = torch.empty_like(x, dtype=out_dtype)
    saved = None
    if keep_states:
        saved = x.new_empty(saved_states_shape(batch, height * width, states, channels))
    problem = Ss2dProblem(
        *sizes,
        *(pointer(x), pointer(projected), projected.stride(2)),
        *(pointer(t) for t in (dt_weight, dt_bias, A, Ds, out, saved)),
    )
    return out, saved, library.call('ss2d_forward', problem)


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
    batch, channels, height, width, states, rank = sizes = _sizes(x, dt_weight, A)
    strips = library.strips(channels)
    columns = NUM_ROUTES * (rank + 2 * states)
    grad_x = torch.empty_like(x)
    grad_projected = x.new_empty(strips, batch, height, width, columns)
    grad_weight = x.new_empty(batch, NUM_ROUTES, rank, channels)
    grad_bias, grad_D = (x.new_empty(batch, NUM_ROUTES, channels) for _ in range(2))
    grad_A = x.new_empty(batch, NUM_ROUTES, states, channels)
    problem = Ss2dProblem(
        *sizes,
        *(pointer(x), pointer(projected), projected.stride(2)),
        *(pointer(t) for t in (dt_weight, dt_bias, A, Ds)),
        *(None, pointer(saved), pointer(grad_out), pointer(grad_x)),
        *(pointer(t) for t in (grad_projected, grad_weight, grad_bias)),
        *(pointer(t) for t in (grad_A, grad_D)),
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
