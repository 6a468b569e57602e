"""The core of the mixer of Vim and Mamba® (arXiv 2401.09417, 2405.14858)."""

import torch
from torch import Tensor

from mmvssm.ops import autocast, backends
from mmvssm.ops.bidirectional_scan.composed import ComposedBidirectional
from mmvssm.ops.bidirectional_scan.cpu_backend import CpuBidirectional
from mmvssm.ops.bidirectional_scan.cuda_backend import CudaBidirectional
from mmvssm.ops.bidirectional_scan.declaration import (
    BIDIRECTIONAL_SCAN,
    BidirectionalInputs,
    BidirectionalOptions,
)
from mmvssm.ops.bidirectional_scan.direction import Direction
from mmvssm.ops.bidirectional_scan.reference import ReferenceBidirectional
from mmvssm.ops.contract import Call

BIDIRECTIONAL_SCAN.supply(
    CpuBidirectional(),
    CudaBidirectional(),
    ReferenceBidirectional(),
    composed=lambda name: ComposedBidirectional(backends.suppliers[name]),
)


def _result(outputs: tuple[Tensor, ...], options: BidirectionalOptions) -> Tensor:
    return outputs[0]


@BIDIRECTIONAL_SCAN.public(finish=_result)
def bidirectional_scan(
    x: Tensor,
    z: Tensor,
    forward: Direction,
    backward: Direction,
    *,
    average: bool = False,
    backend: str | None = None,
) -> Call:
    r"""Scan a sequence from both ends, with separate weights for each direction.

    One direction is a depthwise causal convolution with SiLU, projections to
    step sizes, B and C, and a selective scan with softplus:

    .. math::
        u = \mathrm{SiLU}(\mathrm{conv}(x)), \quad
        y_{dir} = \mathrm{scan}(u, W_\Delta W_x u, A, B, C, D), \quad
        y = (y_{forward} + y_{backward}) \, \mathrm{SiLU}(z)

    The backward direction does the same on the flipped sequence, and flips the result
    back.

    Args:
        x: Sequence (B, D, L), any strides; channels-last memory, (B, L, D), is the
            fastest. float32, bfloat16, float16 or float64.
        z: Gate of x's shape.
        forward: Weights of the direction that starts at position 0.
        backward: Weights of the direction that starts at the end.
        average: Halve the result.
        backend: See :func:`mmvssm.ops.selective_scan`.

    Returns:
        The output (B, D, L) in x's dtype, under autocast in float32. State,
        accumulation and the sum of the directions are float32 (float64 for
        float64 input).

    Raises:
        TypeError: x is not floating-point, or a projection has another dtype
            than x outside autocast.
        ValueError: A shape does not fit.
    """
    _check(x, z, forward, backward)
    out_dtype = projected_dtype = x.dtype
    if autocast.is_enabled(x):
        out_dtype = torch.promote_types(x.dtype, torch.float32)
        projected_dtype = torch.get_autocast_dtype(x.device.type)
    return Call(
        BidirectionalInputs(x, z, Direction(*forward), Direction(*backward)),
        BidirectionalOptions(average, out_dtype, projected_dtype),
        backend,
        states=forward.A.shape[1],
    )


def _check(x: Tensor, z: Tensor, forward: Direction, backward: Direction) -> None:
    if x.ndim != 3 or x.numel() == 0:
        raise ValueError(
            f'bidirectional_scan: x must be (batch, channels, length) with no '
            f'empty side, got {tuple(x.shape)}'
        )
    if not x.is_floating_point():
        raise TypeError(f'bidirectional_scan: x must be floating-point, got {x.dtype}')
    if z.shape != x.shape:
        raise ValueError(
            f"bidirectional_scan: z must have x's shape {tuple(x.shape)}, got "
            f'{tuple(z.shape)}'
        )
    for direction, weights in (('forward', forward), ('backward', backward)):
        _check_direction(x, direction, weights)
    # One scan computes both directions.
    if forward.A.shape != backward.A.shape:
        raise ValueError(
            f'bidirectional_scan: forward and backward must have the same number of '
            f'states, got {forward.A.shape[1]} and {backward.A.shape[1]}'
        )


def _check_direction(x: Tensor, which: str, weights: Direction) -> None:
    for name in ('conv_weight', 'dt_proj_weight', 'A'):
        if getattr(weights, name).ndim != 2:
            raise ValueError(
                f'bidirectional_scan: {which}.{name} must have two dimensions, got '
                f'{tuple(getattr(weights, name).shape)}'
            )
    channels, width = x.shape[1], weights.conv_weight.shape[1]
    rank, states = weights.dt_proj_weight.shape[1], weights.A.shape[1]
    expected: dict[str, tuple[int, ...]] = dict(
        conv_weight=(channels, width),
        conv_bias=(channels,),
        x_proj_weight=(rank + 2 * states, channels),
        dt_proj_weight=(channels, rank),
        dt_proj_bias=(channels,),
        A=(channels, states),
        D=(channels,),
    )
    for name, tensor in zip(Direction._fields, weights):
        shape = expected[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f'bidirectional_scan: {which}.{name} must be {shape} for {channels} '
                f'channels, rank {rank} and {states} states, got '
                f'{tuple(tensor.shape)}'
            )
    for name in ('x_proj_weight', 'dt_proj_weight'):
        dtype = getattr(weights, name).dtype
        if dtype != x.dtype and not autocast.is_enabled(x):
            raise TypeError(
                f'bidirectional_scan: {which}.{name} is {dtype} and x is {x.dtype}; '
                f'convert one of them, or run under torch.autocast'
            )
