"""The bidirectional scan by compiled CPU kernels, forward and backward.

Kernels do all but the matrix products, see ``mmvssm/ops/cpu/bidirectional_scan.h``.
Sequences are (B, L, D) here. The backward pass computes the convolutions and delta
again; only what it cannot compute again cheaply is kept for it.
"""

from collections.abc import Callable, Sequence
from ctypes import byref

import torch
from torch import Tensor

from mmvssm.ops import backends, kernel_args
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
from mmvssm.ops.cpu import library
from mmvssm.ops.cpu.library import (
    Array,
    ConvArgs,
    ConvDirection,
    GateArgs,
    PairArgs,
    ScanArgs,
)
from mmvssm.ops.deterministic_math import linear_product, product_of_columns
from mmvssm.ops.kernel_args import pointer, readable
from mmvssm.ops.selective_scan.cpu_backend import clear_unused, saved_states_shape

# How the scan of each direction reads a tensor: from the start, from the end.
_VIEWS = (Array.of, Array.from_end)


class CpuBidirectional(FusedBidirectional):
    """Kernels do all but the matrix products."""

    supplier = backends.CPU
    dtypes = (torch.float32, torch.bfloat16)

    def states_shape(
        self, batch: int, length: int, states: int, channels: int
    ) -> tuple[int, ...]:
        """Shape of the states of one direction before all chunks but the first."""
        return saved_states_shape(batch, length, states, channels)

    def forward(
        self, inputs: BidirectionalInputs, options: BidirectionalOptions, keep: bool
    ) -> Result:
        """See :func:`mmvssm.ops.bidirectional_scan`."""
        x, z, weights = KernelInputs.of(inputs, options, self.dtypes)
        batch, length, channels = x.shape
        states = weights[0].A.shape[1]
        us = _convolve(x, weights)
        projected = [_project(u, w) for u, w in zip(us, weights)]
        ys = [x.new_empty(x.shape, dtype=torch.float32) for _ in weights]
        last = ys[0].new_empty(2, batch, channels, states)
        saved = None
        if keep:
            size = batch, length, states, channels
            saved = ys[0].new_empty(2, *saved_states_shape(*size))
            clear_unused(saved, 1, size)
        deltas = [_delta(p, w) for p, w in zip(projected, weights)]
        pair = PairArgs()
        for i, view in enumerate(_VIEWS):
            pair.directions[i] = ScanArgs(
                **_scan_inputs(view, us[i], deltas[i], projected[i], weights[i]),
                out=view(ys[i].mT),
                last_state=pointer(last[i]),
                saved=None if saved is None else pointer(saved[i]),
            )
        has_nan = library.kernel('pair_forward')(byref(pair), library.parallel_for())
        (out,) = outputs_like(inputs, options)
        gate = GateArgs(
            batch=batch,
            channels=channels,
            length=length,
            scale=options.scale,
            y=Array.of(ys[0].mT),
            y_from_end=Array.of(ys[1].mT),
            z=Array.of(z.mT),
            out=Array.of(out),
        )
        has_nan |= library.kernel('gate_forward')(byref(gate), library.parallel_for())
        kept = () if saved is None else (ys[0], *projected, saved)
        return Result((out,), kept, has_nan)

    def backward(
        self,
        inputs: BidirectionalInputs,
        options: BidirectionalOptions,
        saved: tuple[Tensor, ...],
        grads: tuple[Tensor | None, ...],
        wanted: BidirectionalInputs,
    ) -> BidirectionalInputs:
        """All gradients."""
        x, z, weights = KernelInputs.of(inputs, options, self.dtypes)
        y, *projected, states = saved
        batch, length, channels = x.shape
        grad_out = readable(grads[0], Array)
        grad_y, grad_z = torch.empty_like(y), torch.empty_like(z)
        gate = GateArgs(
            batch=batch,
            channels=channels,
            length=length,
            scale=options.scale,
            y=Array.of(y.mT),
            z=Array.of(z.mT),
            grad_out=Array.of(grad_out),
            grad_y=Array.of(grad_y.mT),
            grad_z=Array.of(grad_z.mT),
        )
        library.kernel('gate_backward')(byref(gate), library.parallel_for())
        us = _convolve(x, weights)
        scans = _scan_backward(grad_y, us, projected, weights, states)
        rests, by_weights = zip(
            *(
                _project_backward(u, p, w, *scan)
                for u, p, w, scan in zip(us, projected, weights, scans)
            )
        )
        grad_us = [(scan[0], rest) for scan, rest in zip(scans, rests)]
        grad_x, convolutions = _convolve_backward(x, weights, grad_us)
        found = [
            Direction(conv_weight=by_weight, conv_bias=by_bias, **others)
            for others, (by_weight, by_bias) in zip(by_weights, convolutions)
        ]
        return gradients_of(inputs, grad_x, grad_z, found)


# Convolutions


def _convolve(x: Tensor, weights: Sequence[Direction]) -> list[Tensor]:
    us = [x.new_empty(x.shape) for _ in weights]
    directions = [
        ConvDirection(
            weight=pointer(w.conv_weight), bias=pointer(w.conv_bias), out=Array.of(u.mT)
        )
        for u, w in zip(us, weights)
    ]
    args = _convolution(x, weights, directions)
    library.kernel('conv_forward')(byref(args), library.parallel_for())
    return us


def _convolve_backward(
    x: Tensor, weights: Sequence[Direction], grad_us: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Gradients of x, and of each direction's weight and bias.

    Args:
        grad_us: For each direction two gradients of u, to be added.
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
    directions = [
        ConvDirection(
            weight=pointer(w.conv_weight),
            bias=pointer(w.conv_bias),
            grad_scan=Array.of(grads[0].mT),
            grad_rest=Array.of(grads[1].mT),
            grad_weight=pointer(by_weights[0]),
            grad_bias=pointer(by_weights[1]),
        )
        for w, grads, by_weights in zip(weights, grad_us, sums)
    ]
    args = _convolution(x, weights, directions, grad_x)
    library.kernel('conv_backward')(byref(args), library.parallel_for())
    return grad_x, [
        (by_weight.sum(0).T.contiguous(), by_bias.sum(0)) for by_weight, by_bias in sums
    ]


def _convolution(
    x: Tensor,
    weights: Sequence[Direction],
    directions: Sequence[ConvDirection],
    grad_x: Tensor | None = None,
) -> ConvArgs:
    batch, length, channels = x.shape
    return ConvArgs(
        batch=batch,
        channels=channels,
        length=length,
        taps=weights[0].conv_weight.shape[1],
        x=Array.of(x.mT),
        grad_x=Array() if grad_x is None else Array.of(grad_x.mT),
        directions=(ConvDirection * 2)(*directions),
    )


# Projections: from u to dt_low_rank, B and C; then from dt_low_rank to delta


def _project(u: Tensor, weights: Direction) -> Tensor:
    return linear_product(u.to(weights.x_proj_weight.dtype), weights.x_proj_weight)


def _delta(projected: Tensor, weights: Direction) -> Tensor:
    rank = weights.dt_proj_weight.shape[1]
    return linear_product(projected[..., :rank], weights.dt_proj_weight)


def _project_backward(
    u: Tensor, projected: Tensor, weights: Direction, _: Tensor, *grads: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """From the gradients of a scan to those of its projections.

    Args:
        grads: Of delta (B, L, D), B and C (B, L, N), A, D and the bias.

    Returns:
        The gradient of u through the projections, and those of all weights of the
        direction but the convolution's.
    """
    grad_delta, B, C, A, D, bias = grads
    rank = weights.dt_proj_weight.shape[1]
    grad_low_rank = linear_product(grad_delta, weights.dt_proj_weight.t())
    grad = torch.cat([grad_low_rank, B, C], dim=-1)
    u = u.to(projected.dtype).flatten(0, 1)
    dt_low_rank = projected[..., :rank].flatten(0, 1)
    return linear_product(grad, weights.x_proj_weight.t()), dict(
        x_proj_weight=product_of_columns(grad.flatten(0, 1), u),
        dt_proj_weight=product_of_columns(grad_delta.flatten(0, 1), dt_low_rank),
        dt_proj_bias=bias,
        A=A,
        D=D,
    )


# Scans


def _scan_inputs(
    view: Callable[[Tensor], kernel_args.Array],
    u: Tensor,
    delta: Tensor,
    projected: Tensor,
    weights: Direction,
) -> dict[str, object]:
    """The kernel args of the inputs of one direction's scan."""
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
    """For each direction the gradients of u, delta, B, C, A, D and the bias."""
    batch, length, channels = grad_y.shape
    states = weights[0].A.shape[1]
    blocks = library.channel_blocks(channels)
    deltas = [_delta(p, w) for p, w in zip(projected, weights)]
    grad_us = [torch.empty_like(grad_y) for _ in weights]
    grad_deltas = [torch.empty_like(delta) for delta in deltas]
    by_B, by_C = grad_y.new_empty(2, 2, blocks, batch, length, states)
    by_A = grad_y.new_empty(2, batch, states, channels)
    by_D, by_bias = grad_y.new_empty(2, 2, batch, channels)
    args = PairArgs()
    for i, view in enumerate(_VIEWS):
        args.directions[i] = ScanArgs(
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
    library.kernel('pair_backward')(byref(args), library.parallel_for())
    # The kernels write gradients of B and C in the order of the scan.
    in_order = ((t[0].sum(0), t[1].sum(0).flip(1)) for t in (by_B, by_C))
    return [
        (grad_u, grad_delta, B.to(delta.dtype), C.to(delta.dtype))
        + (A.sum(0).T.contiguous(), D.sum(0), bias.sum(0))
        for grad_u, grad_delta, delta, B, C, A, D, bias in zip(
            *(grad_us, grad_deltas, deltas, *in_order, by_A, by_D, by_bias)
        )
    ]
