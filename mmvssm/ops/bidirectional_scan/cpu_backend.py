"""The bidirectional scan by compiled CPU kernels, forward and backward.

Kernels do all but the matrix products, see ``mmvssm/ops/cpu/bidirectional_scan.h``.
Sequences are (B, L, D) here. Only what the scans cannot do without is kept for
the backward pass, which computes convolutions and step sizes once more.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmvssm.ops.bidirectional_scan.direction import Direction
from mmvssm.ops.cpu import library
from mmvssm.ops.cpu.library import (
    Array,
    ConvProblem,
    ConvWay,
    GateProblem,
    ScanPair,
    ScanProblem,
)
from mmvssm.ops.deterministic_math import linear_product
from mmvssm.ops.selective_scan.cpu_backend import saved_states_shape
from mmvssm.ops.structures import pointer

# Of sequences and projections.
DTYPES = (torch.float32, torch.bfloat16)
# How the scan of each direction sees a tensor.
_VIEWS = (Array.of, Array.from_end)


def saved_shape(batch: int, length: int, states: int, channels: int) -> tuple:
    """Shape of the states that forward keeps of both directions."""
    return (2, *saved_states_shape(batch, length, states, channels))


def forward(
    x: Tensor,
    z: Tensor,
    weights: Sequence[Direction],
    average: bool,
    out_dtype: torch.dtype,
    keep_states: bool,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None, bool]:
    """See :func:`mmvssm.ops.bidirectional_scan`; weights are contiguous.

    Returns:
        The output (B, L, D), the sum of the two scans before the gate, the
        projections (B, L, R + 2N) of each direction, with ``keep_states`` the
        states before the tiles of each direction, and whether there is NaN.
    """
    batch, length, channels = x.shape
    states = weights[0].A.shape[1]
    us = _convolve(x, weights)
    projected = [_project(u, w) for u, w in zip(us, weights)]
    ys = [x.new_empty(x.shape, dtype=torch.float32) for _ in weights]
    last = ys[0].new_empty(2, batch, channels, states)
    saved = None
    if keep_states:
        saved = ys[0].new_empty(saved_shape(batch, length, states, channels))
    deltas = [_step_sizes(p, w) for p, w in zip(projected, weights)]
    problem = ScanPair()
    for i, view in enumerate(_VIEWS):
        problem.ways[i] = ScanProblem(
            **_scan_inputs(view, us[i], deltas[i], projected[i], weights[i]),
            out=view(ys[i].mT),
            last_state=pointer(last[i]),
            saved=pointer(saved[i]) if keep_states else None,
        )
    has_nan = library.call('pair_forward', problem)
    out = x.new_empty(x.shape, dtype=out_dtype)
    gate = GateProblem(
        *(batch, channels, length, _scale(average)),
        *(Array.of(t.mT) for t in (*ys, z, out)),
    )
    has_nan |= library.call('gate_forward', gate)
    return out, ys[0], projected, saved, has_nan


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
    batch, length, channels = x.shape
    grad_y, grad_z = torch.empty_like(y), torch.empty_like(z)
    gate = GateProblem(
        *(batch, channels, length, _scale(average)),
        y=Array.of(y.mT),
        z=Array.of(z.mT),
        grad_out=Array.of(grad_out.mT),
        grad_y=Array.of(grad_y.mT),
        grad_z=Array.of(grad_z.mT),
    )
    library.call('gate_backward', gate)
    us = _convolve(x, weights)
    scans = _scan_backward(grad_y, us, projected, weights, saved)
    rests, grads = zip(
        *(
            _project_backward(u, p, w, *scan)
            for u, p, w, scan in zip(us, projected, weights, scans)
        )
    )
    grad_us = [(scan[0], rest) for scan, rest in zip(scans, rests)]
    grad_x, convolutions = _convolve_backward(x, weights, grad_us)
    return (
        grad_x,
        grad_z,
        [
            grad._replace(conv_weight=by_weight, conv_bias=by_bias)
            for grad, (by_weight, by_bias) in zip(grads, convolutions)
        ],
    )


def _scale(average: bool) -> float:
    return 0.5 if average else 1.0


# Convolutions


def _convolve(x: Tensor, weights: Sequence[Direction]) -> list[Tensor]:
    us = [x.new_empty(x.shape) for _ in weights]
    ways = [
        ConvWay(pointer(w.conv_weight), pointer(w.conv_bias), Array.of(u.mT))
        for u, w in zip(us, weights)
    ]
    library.call('conv_forward', _convolution(x, weights, ways))
    return us


def _convolve_backward(
    x: Tensor, weights: Sequence[Direction], grad_us: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Gradients of x and, for each direction, of weight and bias.

    Args:
        grad_us: For each direction two gradients of u to be added up.
    """
    taps = weights[0].conv_weight.shape[1]
    batch, _, channels = x.shape
    grad_x = torch.empty_like(x)
    sums = [
        (
            w.conv_bias.new_empty(batch, taps, channels),
            w.conv_bias.new_empty(batch, channels),
        )
        for w in weights
    ]
    ways = [
        ConvWay(
            pointer(w.conv_weight),
            pointer(w.conv_bias),
            Array(),
            *(Array.of(t.mT) for t in grads),
            *(pointer(t) for t in by_weights),
        )
        for w, grads, by_weights in zip(weights, grad_us, sums)
    ]
    problem = _convolution(x, weights, ways, grad_x)
    library.call('conv_backward', problem)
    return grad_x, [
        (by_weight.sum(0).T.contiguous(), by_bias.sum(0)) for by_weight, by_bias in sums
    ]


def _convolution(
    x: Tensor,
    weights: Sequence[Direction],
    ways: Sequence[ConvWay],
    grad_x: Tensor | None = None,
) -> ConvProblem:
    batch, length, channels = x.shape
    return ConvProblem(
        *(batch, channels, length, weights[0].conv_weight.shape[1]),
        Array.of(x.mT),
        Array() if grad_x is None else Array.of(grad_x.mT),
        (ConvWay * 2)(*ways),
    )


# Projections: to the low rank of the step sizes, B and C; then to step sizes


def _project(u: Tensor, weights: Direction) -> Tensor:
    return linear_product(u.to(weights.x_proj_weight.dtype), weights.x_proj_weight)


def _step_sizes(projected: Tensor, weights: Direction) -> Tensor:
    rank = weights.dt_proj_weight.shape[1]
    return linear_product(projected[..., :rank], weights.dt_proj_weight)


def _project_backward(
    u: Tensor, projected: Tensor, weights: Direction, _: Tensor, *grads: Tensor
) -> tuple[Tensor, Direction]:
    """From the gradients of a scan to those of its projections.

    Args:
        grads: Of the step sizes (B, L, D), B and C (B, L, N), A, D and the bias.

    Returns:
        The gradient of u through the projections and those of the weights,
        the convolution's left out.
    """
    delta, B, C, A, D, bias = grads
    rank = weights.dt_proj_weight.shape[1]
    grad = torch.cat([linear_product(delta, weights.dt_proj_weight.t()), B, C], dim=-1)
    u = u.to(projected.dtype).flatten(0, 1)
    dt = projected[..., :rank].flatten(0, 1)
    return linear_product(grad, weights.x_proj_weight.t()), Direction(
        conv_weight=None,
        conv_bias=None,
        x_proj_weight=linear_product(grad.flatten(0, 1).t(), u.t()),
        dt_proj_weight=linear_product(delta.flatten(0, 1).t(), dt.t()),
        dt_proj_bias=bias,
        A=A,
        D=D,
    )


# Scans


def _scan_inputs(
    view, u: Tensor, delta: Tensor, projected: Tensor, weights: Direction
) -> dict:
    """What the scan of a direction reads."""
    batch, length, channels = u.shape
    states = weights.A.shape[1]
    B, C = projected[..., -2 * states :].unsqueeze(1).mT.split(states, dim=2)
    return dict(
        batch=batch,
        channels=channels,
        length=length,
        states=states,
        groups=1,
        softplus=True,
        u=view(u.mT),
        delta=view(delta.mT),
        B=view(B),
        C=view(C),
        A=pointer(weights.A),
        D=pointer(weights.D),
        bias=pointer(weights.dt_proj_bias),
    )


def _scan_backward(
    grad_y: Tensor,
    us: Sequence[Tensor],
    projected: Sequence[Tensor],
    weights: Sequence[Direction],
    saved: Tensor,
) -> list[tuple[Tensor, ...]]:
    """Gradients of u, delta, B, C, A, D and the bias of each direction."""
    batch, length, channels = grad_y.shape
    states = weights[0].A.shape[1]
    strips = library.strips(channels)
    deltas = [_step_sizes(p, w) for p, w in zip(projected, weights)]
    grad_us = [torch.empty_like(grad_y) for _ in weights]
    grad_deltas = [torch.empty_like(delta) for delta in deltas]
    by_B, by_C = grad_y.new_empty(2, 2, strips, batch, length, states)
    by_A = grad_y.new_empty(2, batch, states, channels)
    by_D, by_bias = grad_y.new_empty(2, 2, batch, channels)
    problem = ScanPair()
    for i, view in enumerate(_VIEWS):
        problem.ways[i] = ScanProblem(
            **_scan_inputs(view, us[i], deltas[i], projected[i], weights[i]),
            saved=pointer(saved[i]),
            grad_out=view(grad_y.mT),
            grad_u=view(grad_us[i].mT),
            grad_delta=view(grad_deltas[i].mT),
            grad_B=pointer(by_B[i]),
            grad_C=pointer(by_C[i]),
            grad_A=pointer(by_A[i]),
            grad_D=pointer(by_D[i]),
            grad_bias=pointer(by_bias[i]),
        )
    library.call('pair_backward', problem)
    # Gradients of B and C come in the order of the scan.
    in_order = ((t[0].sum(0), t[1].sum(0).flip(1)) for t in (by_B, by_C))
    return [
        (grad_u, grad_delta, B.to(delta.dtype), C.to(delta.dtype))
        + (A.sum(0).T.contiguous(), D.sum(0), bias.sum(0))
        for grad_u, grad_delta, delta, B, C, A, D, bias in zip(
            *(grad_us, grad_deltas, deltas, *in_order, by_A, by_D, by_bias)
        )
    ]
