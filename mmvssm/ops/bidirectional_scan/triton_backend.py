"""The bidirectional scan by Triton kernels, forward and backward.

The kernels of the selective scan walk the sequence from either end by index
arithmetic; the second scan adds to the first one's outputs and applies the gate.
Only what the scans cannot do without is kept for the backward pass, which
computes the convolutions once more.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmvssm.ops import checks
from mmvssm.ops.bidirectional_scan.direction import Direction
from mmvssm.ops.deterministic_math import linear_product
from mmvssm.ops.selective_scan import triton_plan
from mmvssm.ops.selective_scan.triton_backend import scan_backward, scan_forward
from mmvssm.ops.selective_scan.triton_plan import (
    Inputs,
    Plan,
    low_rank_gradients,
    low_rank_steps,
)
from mmvssm.ops.triton import runtime, tiles
from mmvssm.ops.triton.arrays import array

# Of sequences and projections.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Orders of the positions, see selective_scan/triton_kernels.py.
_FROM_START, _FROM_END = 0, 2


def saved_shape(batch: int, length: int, states: int, channels: int) -> tuple:
    """Shape of the states that forward keeps of both directions."""
    return (2, *triton_plan.saved_states_shape(batch, length, states, channels))


def forward(
    x: Tensor,
    z: Tensor,
    weights: Sequence[Direction],
    average: bool,
    out_dtype: torch.dtype,
    keep_states: bool,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None, bool]:
    """See :func:`mmvssm.ops.bidirectional_scan`.

    Returns:
        The output (B, L, D), the sum of the two scans before the gate, the
        projections (B, L, R + 2N) of each direction, with ``keep_states`` the
        states before the chunks of each direction, and whether there is NaN.
    """
    batch, length, channels = x.shape
    us = _convolve(x, weights)
    projected = [
        linear_product(u.to(w.x_proj_weight.dtype), w.x_proj_weight)
        for u, w in zip(us, weights)
    ]
    y = x.new_empty(x.shape, dtype=torch.float32)
    out = x.new_empty(x.shape, dtype=out_dtype)
    kept = (None, None)
    if keep_states:
        shape = saved_shape(batch, length, weights[0].A.shape[1], channels)
        kept = x.new_empty(shape, dtype=torch.float32)
    first = _scan_inputs(us[0], projected[0], weights[0])
    plan = Plan.of(first, True, route=_FROM_START)
    scan_forward(plan, first, y.mT, saved=kept[0])
    second = _scan_inputs(us[1], projected[1], weights[1], z)
    plan = Plan.of(second, True, route=_FROM_END, scale=_scale(average))
    total = y.mT if keep_states else None
    scan_forward(plan, second, out.mT, added=y.mT, total=total, saved=kept[1])
    saved = kept if keep_states else None
    return out, y, projected, saved, checks.has_nan(out)


def backward(
    grad_out: Tensor,
    x: Tensor,
    z: Tensor,
    weights: Sequence[Direction],
    average: bool,
    y: Tensor,
    projected: Sequence[Tensor],
    saved: Tensor,
) -> tuple[Tensor, Tensor, list[Direction]]:
    """Gradients of x, z and the weights.

    Args:
        grad_out: Gradient of the output (B, L, D).
        y, projected, saved: What :func:`forward` returned behind the output.
    """
    us = _convolve(x, weights)
    grad_z = torch.empty_like(z)
    grad_us, found = [], []
    for i, (u, p, w) in enumerate(zip(us, projected, weights)):
        inputs = _scan_inputs(u, p, w, z)
        route = (_FROM_START, _FROM_END)[i]
        plan = Plan.of(inputs, True, backward=True, route=route, scale=_scale(average))
        grads = scan_backward(
            *(plan, inputs, saved[i], grad_out.mT),
            grad_u=torch.empty_like(u).mT,
            grad_delta=u.new_empty(u.shape, dtype=p.dtype).mT,
            # Of the gate, which is common, once.
            grad_z=grad_z.mT if i == 0 else None,
            total=y.mT,
        )
        rest, by_weights = _project_backward(u, p, w, grads)
        grad_us.append((grads.u.mT, rest))
        found.append(by_weights)
    grad_x, convolutions = _convolve_backward(x, weights, grad_us)
    return (
        grad_x,
        grad_z,
        [
            grad._replace(conv_weight=by_weight, conv_bias=by_bias)
            for grad, (by_weight, by_bias) in zip(found, convolutions)
        ],
    )


def _scale(average: bool) -> float:
    return 0.5 if average else 1.0


# Convolutions


class _Way(NamedTuple):
    """The convolution of a direction as the kernels take it.

    Attributes:
        weight, bias: Arrays (D, W) and (D,).
        out: Array of the result (B, L, D).
        grads: Two arrays of its gradient, to be added up.
        sums: Memory for parts of the gradients of weight and bias.
    """

    weight: Any
    bias: Any
    out: Any = None
    grads: Any = None
    sums: Any = None


def _convolve(x: Tensor, weights: Sequence[Direction]) -> list[Tensor]:
    from mmvssm.ops.bidirectional_scan import triton_kernels

    us = [x.new_empty(x.shape) for _ in weights]
    ways = tuple(
        _Way(array(w.conv_weight), array(w.conv_bias), array(u))
        for w, u in zip(weights, us)
    )
    batch, length, channels = x.shape
    tile = tiles.convolution_tile(channels)
    blocks = -(-length // tile.rows)
    with runtime.on_device_of(x):
        triton_kernels.conv_forward_kernel[
            (batch * -(-channels // tile.channels) * blocks,)
        ](array(x), ways, tuple(x.shape), blocks, **_constants(weights, tile))
    return us


def _convolve_backward(
    x: Tensor, weights: Sequence[Direction], grad_us: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Gradients of x and, for each direction, of weight and bias.

    Args:
        grad_us: For each direction two gradients of u to be added up.
    """
    from mmvssm.ops.bidirectional_scan import triton_kernels

    batch, length, channels = x.shape
    tile = tiles.convolution_tile(channels)
    blocks = -(-length // tile.rows)
    parts = -(-blocks // tile.repeats)
    repeats = -(-blocks // parts)
    taps = weights[0].conv_weight.shape[1]
    shape = (batch, parts, taps + 1, channels)
    grad_x = torch.empty_like(x)
    ways = tuple(
        _Way(
            array(w.conv_weight),
            array(w.conv_bias),
            grads=tuple(array(grad) for grad in grads),
            sums=x.new_empty(shape, dtype=torch.float32),
        )
        for w, grads in zip(weights, grad_us)
    )
    with runtime.on_device_of(x):
        triton_kernels.conv_backward_kernel[
            (batch * -(-channels // tile.channels) * parts,)
        ](
            *(array(x), array(grad_x), ways, tuple(x.shape), parts, repeats),
            **_constants(weights, tile),
        )
    sums = [way.sums.sum((0, 1)) for way in ways]
    return grad_x, [(s[:-1].mT.clone(), s[-1].clone()) for s in sums]


def _constants(weights: Sequence[Direction], tile: tiles.Tile) -> dict[str, int]:
    return dict(
        TAPS=weights[0].conv_weight.shape[1],
        BLOCK_L=tile.rows,
        BLOCK_D=tile.channels,
        num_warps=tile.warps,
    )


# Scans and the projections to what they read


def _scan_inputs(
    u: Tensor, projected: Tensor, weights: Direction, z: Tensor | None = None
) -> Inputs:
    rank, states = weights.dt_proj_weight.shape[1], weights.A.shape[1]
    dt, B, C = projected.split((rank, states, states), dim=2)
    delta, delta_weight = low_rank_steps(dt, weights.dt_proj_weight, states)
    return Inputs(
        *(u.mT, delta, weights.A, B.mT.unsqueeze(1), C.mT.unsqueeze(1), weights.D),
        *(None if z is None else z.mT, weights.dt_proj_bias, delta_weight),
    )


def _project_backward(
    u: Tensor, projected: Tensor, weights: Direction, grads: Inputs
) -> tuple[Tensor, Direction]:
    """From the gradients of a scan to those of its projections.

    Returns:
        The gradient of u through the projections and those of the weights,
        the convolution's left out.
    """
    dt = projected[..., : weights.dt_proj_weight.shape[1]]
    by_dt, by_weight = low_rank_gradients(grads.delta, dt, weights.dt_proj_weight)
    B, C = (t[:, 0].mT.to(dt.dtype) for t in (grads.B, grads.C))
    grad = torch.cat([by_dt, B, C], dim=-1)
    rows = u.to(dt.dtype).flatten(0, 1)
    return linear_product(grad, weights.x_proj_weight.t()), Direction(
        conv_weight=None,
        conv_bias=None,
        x_proj_weight=linear_product(grad.flatten(0, 1).t(), rows.t()),
        dt_proj_weight=by_weight,
        dt_proj_bias=grads.delta_bias,
        A=grads.A,
        D=grads.D,
    )
