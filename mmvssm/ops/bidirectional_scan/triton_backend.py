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

from mmvssm.ops import backends
from mmvssm.ops.bidirectional_scan.declaration import (
    BidirectionalInputs,
    BidirectionalOptions,
    FusedBidirectional,
    KernelInputs,
    gradients_of,
    outputs_like,
)
from mmvssm.ops.bidirectional_scan.direction import Direction
from mmvssm.ops.contract import Result
from mmvssm.ops.deterministic_math import linear_product
from mmvssm.ops.selective_scan.triton_backend import scan_backward, scan_forward
from mmvssm.ops.selective_scan.triton_plan import (
    Inputs,
    Plan,
    low_rank_gradients,
    low_rank_steps,
    saved_states_shape,
)
from mmvssm.ops.triton import runtime, tiles
from mmvssm.ops.triton.arrays import array
from mmvssm.ops.typed import sole

# Orders of the positions, see selective_scan/triton_kernels.py.
_FROM_START, _FROM_END = 0, 2


class TritonBidirectional(FusedBidirectional):
    """Kernels do all but the matrix products."""

    supplier = backends.TRITON
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def states_shape(
        self, batch: int, length: int, states: int, channels: int
    ) -> tuple[int, ...]:
        """Of the states before each chunk but the first."""
        return saved_states_shape(batch, length, states, channels)

    def forward(
        self, inputs: BidirectionalInputs, options: BidirectionalOptions, keep: bool
    ) -> Result:
        """See :func:`mmvssm.ops.bidirectional_scan`."""
        x, z, weights = KernelInputs.of(inputs, options, self.dtypes)
        batch, length, channels = x.shape
        us = _convolve(x, weights)
        projected = [
            linear_product(u.to(w.x_proj_weight.dtype), w.x_proj_weight)
            for u, w in zip(us, weights)
        ]
        y = x.new_empty(x.shape, dtype=torch.float32)
        (out,) = outputs_like(inputs, options)
        kept = None
        if keep:
            states = weights[0].A.shape[1]
            shape = saved_states_shape(batch, length, states, channels)
            kept = x.new_empty(2, *shape, dtype=torch.float32)
        to, then_to = (None, None) if kept is None else (kept[0], kept[1])
        first = _scan_inputs(us[0], projected[0], weights[0])
        plan = Plan.of(first, True, route=_FROM_START)
        scan_forward(plan, first, y.mT, saved=to)
        second = _scan_inputs(us[1], projected[1], weights[1], z)
        plan = Plan.of(second, True, route=_FROM_END, scale=options.scale)
        total = None if kept is None else y.mT
        scan_forward(plan, second, out, added=y.mT, total=total, saved=then_to)
        saved = () if kept is None else (y, *projected, kept)
        return Result((out,), saved)

    def backward(
        self,
        inputs: BidirectionalInputs,
        options: BidirectionalOptions,
        saved: tuple[Tensor, ...],
        grads: tuple[Tensor | None, ...],
        wanted: BidirectionalInputs,
    ) -> BidirectionalInputs:
        """All gradients; convolutions and step sizes are computed once more."""
        x, z, weights = KernelInputs.of(inputs, options, self.dtypes)
        y, *projected, states = saved
        us = _convolve(x, weights)
        grad_z = torch.empty_like(z)
        grad_us, by_weights = [], []
        for i, (u, p, w) in enumerate(zip(us, projected, weights)):
            scan = _scan_inputs(u, p, w, z)
            route = (_FROM_START, _FROM_END)[i]
            plan = Plan.of(scan, True, backward=True, route=route, scale=options.scale)
            by_scan = scan_backward(
                *(plan, scan, states[i], sole(grads)),
                grad_u=torch.empty_like(u).mT,
                grad_delta=u.new_empty(u.shape, dtype=p.dtype).mT,
                # Of the gate, which is common, once.
                grad_z=grad_z.mT if i == 0 else None,
                total=y.mT,
            )
            rest, by_others = _project_backward(u, p, w, by_scan)
            grad_us.append((by_scan.u.mT, rest))
            by_weights.append(by_others)
        grad_x, convolutions = _convolve_backward(x, weights, grad_us)
        found = [
            Direction(conv_weight=by_weight, conv_bias=by_bias, **others)
            for others, (by_weight, by_bias) in zip(by_weights, convolutions)
        ]
        return gradients_of(inputs, grad_x, grad_z, found)


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
        _Way(weight=array(w.conv_weight), bias=array(w.conv_bias), out=array(u))
        for w, u in zip(weights, us)
    )
    batch, length, channels = x.shape
    tile = tiles.convolution_tile(channels)
    blocks = -(-length // tile.rows)
    with runtime.on_device_of(x):
        triton_kernels.conv_forward_kernel[
            (batch * -(-channels // tile.channels) * blocks,)
        ](
            x=array(x),
            ways=ways,
            shape=tuple(x.shape),
            parts=blocks,
            **_constants(weights, tile),
        )
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
            weight=array(w.conv_weight),
            bias=array(w.conv_bias),
            grads=tuple(array(grad) for grad in grads),
            sums=x.new_empty(shape, dtype=torch.float32),
        )
        for w, grads in zip(weights, grad_us)
    )
    with runtime.on_device_of(x):
        triton_kernels.conv_backward_kernel[
            (batch * -(-channels // tile.channels) * parts,)
        ](
            x=array(x),
            grad_x=array(grad_x),
            ways=ways,
            shape=tuple(x.shape),
            parts=parts,
            repeats=repeats,
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
        u=u.mT,
        delta=delta,
        A=weights.A,
        B=B.mT.unsqueeze(1),
        C=C.mT.unsqueeze(1),
        D=weights.D,
        z=None if z is None else z.mT,
        delta_bias=weights.dt_proj_bias,
        delta_weight=delta_weight,
    )


def _project_backward(
    u: Tensor, projected: Tensor, weights: Direction, grads: Inputs
) -> tuple[Tensor, dict[str, Tensor]]:
    """From the gradients of a scan to those of its projections.

    Returns:
        The gradient of u through the projections and those of the weights,
        the convolution's left out.
    """
    by_bias, by_D = grads.delta_bias, grads.D
    assert by_bias is not None and by_D is not None, 'a direction has both'
    dt = projected[..., : weights.dt_proj_weight.shape[1]]
    by_dt, by_weight = low_rank_gradients(grads.delta, dt, weights.dt_proj_weight)
    B, C = (t[:, 0].mT.to(dt.dtype) for t in (grads.B, grads.C))
    grad = torch.cat([by_dt, B, C], dim=-1)
    rows = u.to(dt.dtype).flatten(0, 1)
    return linear_product(grad, weights.x_proj_weight.t()), dict(
        x_proj_weight=linear_product(grad.flatten(0, 1).t(), rows.t()),
        dt_proj_weight=by_weight,
        dt_proj_bias=by_bias,
        A=grads.A,
        D=by_D,
    )
