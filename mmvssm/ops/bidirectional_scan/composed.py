"""The bidirectional scan, composed of one selective scan over both directions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvssm.ops import deterministic_math
from mmvssm.ops.backends import Supplier
from mmvssm.ops.bidirectional_scan.declaration import (
    BidirectionalInputs,
    BidirectionalOptions,
)
from mmvssm.ops.bidirectional_scan.direction import Direction
from mmvssm.ops.contract import Call, Composed, Result
from mmvssm.ops.linear.declaration import LINEAR
from mmvssm.ops.linear.op import deterministic_call
from mmvssm.ops.selective_scan.declaration import (
    SELECTIVE_SCAN,
    ScanInputs,
    ScanOptions,
)


@dataclass(frozen=True)
class ComposedBidirectional(Composed):
    """One scan for both directions, as two groups of channels.

    The convolutions and projections of both directions read the sequence without a
    flipped copy. The second group is scanned from the end. The gate of a position is
    the same for both directions, so it is applied after they are added up.
    """

    supplier: Supplier

    def forward(
        self, inputs: BidirectionalInputs, options: BidirectionalOptions, keep: bool
    ) -> Result:
        """See :func:`mmvssm.ops.bidirectional_scan`."""
        x, z, *directions = inputs
        dtype, read = options.projected_dtype, []
        for weights, from_end in zip(directions, (False, True)):
            rank, states = weights.dt_proj_weight.shape[1], weights.A.shape[1]
            u = _convolve(x.mT, weights, from_end)
            call = deterministic_call(u.to(dtype), weights.x_proj_weight.to(dtype))
            function, arguments = LINEAR.route(call)
            (projected,) = LINEAR.outputs(call, function(*arguments))
            dt, B, C = projected.split((rank, states, states), dim=-1)
            call = deterministic_call(dt, weights.dt_proj_weight.to(dtype))
            function, arguments = LINEAR.route(call)
            (delta,) = LINEAR.outputs(call, function(*arguments))
            along = (u, delta, B, C)
            read.append([t.flip(1) for t in along] if from_end else along)
        call = _scan_call(inputs, read, self.supplier.name)
        function, arguments = SELECTIVE_SCAN.route(call)
        ys, _ = SELECTIVE_SCAN.outputs(call, function(*arguments))
        y, y_from_end = ys.split(x.shape[1], dim=1)
        gate = options.scale * deterministic_math.silu(z.to(ys.dtype))
        y = (y + y_from_end.flip(-1)) * gate
        return Result((y.to(options.out_dtype),), has_nan=False)


def _scan_call(
    inputs: BidirectionalInputs, read: Sequence[Sequence[Tensor]], backend: str
) -> Call:
    """The scan of both directions.

    Args:
        inputs: Inputs of the op.
        read: For each direction, in its order: u and delta (B, L, D), B and C
            (B, L, N).
        backend: Backend of the scan.
    """
    _, _, forward, backward = inputs
    # (B, L, 2, ...)
    u, delta, B, C = (torch.stack(pair, dim=2) for pair in zip(*read))
    A, D, bias = (
        torch.cat((getattr(forward, name), getattr(backward, name)))
        for name in ('A', 'D', 'dt_proj_bias')
    )
    scan = ScanInputs(
        u=u.flatten(2).mT,
        delta=delta.flatten(2).mT,
        A=A,
        B=B.permute(0, 2, 3, 1),
        C=C.permute(0, 2, 3, 1),
        D=D,
        delta_bias=bias,
    )
    wide = torch.promote_types(inputs.x.dtype, torch.float32)
    return Call(scan, ScanOptions(True, wide), backend, A.shape[1])


def _convolve(x: Tensor, weights: Direction, from_end: bool) -> Tensor:
    """Depthwise convolution along the direction with SiLU, in x's dtype.

    It is computed at least in float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    length, width = x.shape[1], weights.conv_weight.shape[1]
    taps = weights.conv_weight.to(dtype).unbind(1)
    if from_end:
        taps = taps[::-1]
    padding = (0, width - 1) if from_end else (width - 1, 0)
    padded = F.pad(x.to(dtype), (0, 0, *padding))
    # Shifted products keep channels-last memory.
    out = weights.conv_bias.to(dtype)
    for shift, tap in enumerate(taps):
        out = out + padded[:, shift : shift + length] * tap
    return deterministic_math.silu(out).to(x.dtype)
