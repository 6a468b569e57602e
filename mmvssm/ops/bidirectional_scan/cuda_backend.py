"""The bidirectional scan by CUDA kernels, forward and backward.

The kernels of the selective scan walk the sequence from either end by index
arithmetic, and make the step sizes of their low-rank form; the second scan adds to the
first one's outputs and applies the gate. Only what the scans cannot do without is kept
for the backward pass, which computes the convolutions once more.
"""

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
from mmvssm.ops.cuda import many_states
from mmvssm.ops.cuda.convolution import convolve, convolve_backward
from mmvssm.ops.cuda.scan import Scan
from mmvssm.ops.deterministic_math import linear_product, product_of_columns
from mmvssm.ops.typed import sole

# Orders of the positions, see :class:`mmvssm.ops.cuda.scan.Scan`.
_ROUTES = (0, 2)


class CudaBidirectional(FusedBidirectional):
    """Kernels do all but the matrix products."""

    supplier = backends.CUDA
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def states_shape(
        self, batch: int, length: int, states: int, channels: int
    ) -> tuple[int, ...]:
        """Of the states that the kernels keep."""
        return many_states.saved_shape(batch, length, states, channels)

    def forward(
        self, inputs: BidirectionalInputs, options: BidirectionalOptions, keep: bool
    ) -> Result:
        """See :func:`mmvssm.ops.bidirectional_scan`."""
        x, z, weights = KernelInputs.of(inputs, options, self.dtypes)
        batch, length, channels = x.shape
        us = convolve(x, weights)
        projected = [
            linear_product(u.to(w.x_proj_weight.dtype), w.x_proj_weight)
            for u, w in zip(us, weights)
        ]
        y = x.new_empty(x.shape, dtype=torch.float32)
        (out,) = outputs_like(inputs, options)
        kept = None
        if keep:
            states = weights[0].A.shape[1]
            shape = self.states_shape(batch, length, states, channels)
            kept = x.new_empty(2, *shape, dtype=torch.float32)
        for i, (u, p, w) in enumerate(zip(us, projected, weights)):
            is_last = i == 1
            many_states.forward(
                _scan(u, p, w, _ROUTES[i], z if is_last else None),
                out if is_last else y.mT,
                saved=None if kept is None else kept[i],
                add=y.mT if is_last else None,
                scale=options.scale,
                put_total=keep and is_last,
            )
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
        us = convolve(x, weights)
        grad_z = torch.empty_like(z)
        grad_us, by_weights = [], []
        for i, (u, p, w) in enumerate(zip(us, projected, weights)):
            grad_u, grad_delta = (
                torch.empty_like(u),
                u.new_empty(u.shape, dtype=p.dtype),
            )
            by_A, by_B, by_C, by_D, by_bias = many_states.backward(
                *(_scan(u, p, w, _ROUTES[i], z), states[i], sole(grads), None),
                # The gate is common, so its gradient is found once.
                rows=(grad_u.mT, grad_delta.mT, None if i else grad_z.mT),
                total=y.mT,
                scale=options.scale,
            )
            assert by_D is not None and by_bias is not None, 'a direction has both'
            rest, of_projections = _project_backward(u, p, w, grad_delta, by_B, by_C)
            grad_us.append((grad_u, rest))
            by_weights.append(
                dict(**of_projections, A=by_A, D=by_D, dt_proj_bias=by_bias)
            )
        grad_x, convolutions = convolve_backward(x, weights, grad_us)
        found = [
            Direction(conv_weight=by_weight, conv_bias=by_bias, **others)
            for others, (by_weight, by_bias) in zip(by_weights, convolutions)
        ]
        return gradients_of(inputs, grad_x, grad_z, found)


def _scan(
    u: Tensor, projected: Tensor, weights: Direction, route: int, z: Tensor | None
) -> Scan:
    rank, states = weights.dt_proj_weight.shape[1], weights.A.shape[1]
    dt, B, C = projected.split((rank, states, states), dim=2)
    return Scan(
        u=u.mT,
        A=weights.A,
        B=B.mT.unsqueeze(1),
        C=C.mT.unsqueeze(1),
        D=weights.D,
        z=None if z is None else z.mT,
        bias=weights.dt_proj_bias,
        dt_low_rank=dt.mT,
        dt_weight=weights.dt_proj_weight,
        route=route,
    )


def _project_backward(
    u: Tensor,
    projected: Tensor,
    weights: Direction,
    grad_delta: Tensor,
    grad_B: Tensor,
    grad_C: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """From the gradients of a scan to those of its projections.

    Args:
        u: (B, L, D).
        projected: (B, L, R + 2N).
        weights: Of the direction.
        grad_delta: Of the step sizes before bias and softplus (B, L, D), in the dtype
            of ``projected``.
        grad_B, grad_C: (B, 1, L, N).

    Returns:
        The gradient of u (B, L, D) through the projections, and those of their weights.
    """
    dtype, weight = projected.dtype, weights.dt_proj_weight
    dt = projected[..., : weight.shape[1]].flatten(0, 1)
    rows = grad_delta.flatten(0, 1)
    by_dt = linear_product(rows, weight.to(dtype).t()).unflatten(0, u.shape[:2])
    grad = torch.cat([by_dt, *(x[:, 0].to(dtype) for x in (grad_B, grad_C))], dim=-1)
    by_weight = product_of_columns(rows, dt).to(weight.dtype)
    inputs = u.to(dtype).flatten(0, 1)
    return linear_product(grad, weights.x_proj_weight.t()), dict(
        x_proj_weight=product_of_columns(grad.flatten(0, 1), inputs),
        dt_proj_weight=by_weight,
    )
