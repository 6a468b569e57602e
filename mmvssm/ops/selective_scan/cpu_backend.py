"""The selective scan by compiled CPU kernels, forward and backward.

Only the states before every tile of positions are kept for the backward pass,
which recomputes the rest. See ``mmvssm/ops/cpu/`` for the kernels.
"""

import torch
from torch import Tensor

from mmvssm.ops.cpu import library
from mmvssm.ops.cpu.library import Array, ScanProblem
from mmvssm.ops.gradients import like_inputs
from mmvssm.ops.structures import pointer


def saved_states_shape(
    batch: int, length: int, states: int, channels: int
) -> tuple[int, int, int, int]:
    """Shape of what forward keeps: the state before each tile but the first."""
    return (-(-length // library.tile()) - 1, batch, states, channels)


def _native(x: Tensor | None) -> Tensor | None:
    """The tensor in a dtype that the kernels read."""
    if x is None or x.dtype in (torch.float32, torch.bfloat16):
        return x
    return x.float()


def _parameter(x: Tensor | None) -> Tensor | None:
    """The tensor as contiguous float32."""
    return None if x is None else x.float().contiguous()


def forward(
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
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """See :func:`mmvssm.ops.selective_scan`; B and C are (B, G, N, L).

    Returns:
        The output (B, D, L) with u's strides, the last state (B, D, N), with
        ``keep_states`` the states before the tiles (tiles - 1, B, N, D), and
        whether there is NaN.
    """
    batch, channels, length = u.shape
    states = A.shape[1]
    out = torch.empty_like(u, dtype=out_dtype)
    last_state = u.new_empty(batch, channels, states, dtype=torch.float32)
    saved = None
    if keep_states:
        shape = saved_states_shape(batch, length, states, channels)
        saved = u.new_empty(shape, dtype=torch.float32)
    delta, B, C, z = (_native(x) for x in (delta, B, C, z))
    A, D, delta_bias = (_parameter(x) for x in (A, D, delta_bias))
    problem = ScanProblem(
        *(batch, channels, length, states, B.shape[1], delta_softplus),
        *(Array.of(x) for x in (u, delta, z, B, C)),
        *(pointer(x) for x in (A, D, delta_bias)),
        Array.of(out),
        *(pointer(x) for x in (last_state, saved)),
    )
    has_nan = library.call('scan_forward', problem)
    return out, last_state, saved, has_nan


def backward(
    grad_out: Tensor | None,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    saved: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z and delta_bias.

    Args:
        grad_out: Gradient of the output (B, D, L), None for zero.
        grad_last_state: Gradient of the last state (B, D, N), None for zero.
        saved: The third result of :func:`forward`.
    """
    batch, channels, length = u.shape
    groups, states = B.shape[1], A.shape[1]
    if grad_out is None:
        grad_out = torch.zeros_like(u)
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    grad_out, delta, B, C, z = (_native(x) for x in (grad_out, delta, B, C, z))
    A, D, delta_bias, grad_last_state = (
        _parameter(x) for x in (A, D, delta_bias, grad_last_state)
    )
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    grad_z = None if z is None else torch.empty_like(z)

    def sums(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    strips = library.strips(channels // groups)
    grad_B, grad_C = (sums(strips, batch, groups, length, states) for _ in 'BC')
    grad_A = sums(batch, states, channels)
    grad_D, grad_bias = sums(batch, channels), sums(batch, channels)
    library.call(
        'scan_backward',
        ScanProblem(
            *(batch, channels, length, states, groups, delta_softplus),
            *(Array.of(x) for x in (u, delta, z, B, C)),
            *(pointer(x) for x in (A, D, delta_bias)),
            Array(),
            *(None, pointer(saved)),
            Array.of(grad_out),
            pointer(grad_last_state),
            *(Array.of(x) for x in (grad_u, grad_delta, grad_z)),
            *(pointer(x) for x in (grad_B, grad_C, grad_A, grad_D, grad_bias)),
        ),
    )
    found = (
        grad_u,
        grad_delta,
        grad_A.sum(0).T,
        grad_B.sum(0).mT,
        grad_C.sum(0).mT,
        grad_D.sum(0),
        grad_z,
        grad_bias.sum(0),
    )
    return like_inputs(found, inputs)
