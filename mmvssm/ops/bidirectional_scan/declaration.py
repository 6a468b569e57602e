"""Declaration of the bidirectional scan."""

from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvssm.ops.bidirectional_scan.direction import Direction
from mmvssm.ops.contract import Flops, KernelBackend
from mmvssm.ops.operator import Op
from mmvssm.ops.selective_scan.declaration import scan_flops


class BidirectionalInputs(NamedTuple):
    """Inputs of a bidirectional scan, or their gradients.

    Attributes:
        x: Sequence (B, D, L).
        z: Gate of x's shape.
        forward: Weights of the direction that starts at position 0.
        backward: Weights of the direction that starts at the end.
    """

    x: Tensor
    z: Tensor
    forward: Direction
    backward: Direction


class BidirectionalOptions(NamedTuple):
    """Options of a bidirectional scan.

    Attributes:
        average: Halve the result.
        out_dtype: Dtype of the output.
        projected_dtype: Dtype in which projections are computed.
    """

    average: bool
    out_dtype: torch.dtype
    projected_dtype: torch.dtype

    @property
    def scale(self) -> float:
        """Factor by which the result is multiplied."""
        return 0.5 if self.average else 1.0


def outputs_like(
    inputs: BidirectionalInputs, options: BidirectionalOptions
) -> tuple[Tensor]:
    """Memory for the output (B, D, L), channels-last."""
    batch, channels, length = inputs.x.shape
    return (inputs.x.new_empty(batch, length, channels, dtype=options.out_dtype).mT,)


def _flops(shapes: BidirectionalInputs, options: BidirectionalOptions) -> list[Flops]:
    batch, channels, length = shapes.x
    positions, directions = batch * length, (shapes.forward, shapes.backward)
    taps = sum(prod(direction.conv_weight) for direction in directions)
    weights = sum(
        prod(direction.x_proj_weight) + prod(direction.dt_proj_weight)
        for direction in directions
    )
    _, states = shapes.forward.A
    scans = scan_flops(batch, 2 * channels, length, states)
    return [
        Flops(positions * taps, part='convolutions'),
        Flops(positions * weights, part='projections'),
        Flops(0, scans + positions * channels, part='scans'),
    ]


BIDIRECTIONAL_SCAN = Op(
    'bidirectional_scan',
    BidirectionalInputs,
    BidirectionalOptions,
    returns=('y',),
    saves=4,
    outputs_like=outputs_like,
    flops=_flops,
    axes=dict(x=(0, 2), z=(0, 2)),
)


class KernelInputs(NamedTuple):
    """The inputs in a form that kernels can read.

    Attributes:
        x, z: (B, L, D), of a dtype that the kernels can read.
        weights: Weights of both directions, contiguous. Matrices have the dtype of the
            projections, all others float32. Both convolutions have the same width.
    """

    x: Tensor
    z: Tensor
    weights: tuple[Direction, Direction]

    @classmethod
    def of(
        cls,
        inputs: BidirectionalInputs,
        options: BidirectionalOptions,
        dtypes: tuple[torch.dtype, ...],
    ) -> 'KernelInputs':
        """Make them for kernels that can read these dtypes."""
        directions = (inputs.forward, inputs.backward)
        taps = max(direction.conv_weight.shape[1] for direction in directions)
        first, second = (
            _as_read(direction, taps, options.projected_dtype)
            for direction in directions
        )
        x, z = (t if t.dtype in dtypes else t.float() for t in inputs[:2])
        return cls(x.mT, z.mT, (first, second))


def _as_read(weights: Direction, taps: int, dtype: torch.dtype) -> Direction:
    matrices = ('x_proj_weight', 'dt_proj_weight')
    found = {
        name: tensor.to(dtype if name in matrices else torch.float32)
        for name, tensor in weights._asdict().items()
    }
    missing = taps - weights.conv_weight.shape[1]
    if missing:
        found['conv_weight'] = F.pad(found['conv_weight'], (missing, 0))
    return Direction(**{name: tensor.contiguous() for name, tensor in found.items()})


def gradients_of(
    inputs: BidirectionalInputs,
    grad_x: Tensor,
    grad_z: Tensor,
    grads: list[Direction],
) -> BidirectionalInputs:
    """Gradients of the op's inputs, from those of the kernels' inputs."""
    directions = (inputs.forward, inputs.backward)
    first, second = (
        grad._replace(
            conv_weight=grad.conv_weight[:, -direction.conv_weight.shape[1] :]
        )
        for direction, grad in zip(directions, grads)
    )
    return BidirectionalInputs(grad_x.mT, grad_z.mT, first, second)


class FusedBidirectional(KernelBackend):
    """Base of backends whose kernels run both directions without a flipped copy.

    Attributes:
        dtypes: Dtypes of the sequence and its projections that the kernels can read.
    """

    dtypes: tuple[torch.dtype, ...]

    def refuses(
        self, inputs: BidirectionalInputs, options: BidirectionalOptions
    ) -> str | None:
        """It refuses projections that the kernels cannot read."""
        if options.projected_dtype not in self.dtypes:
            return f'it cannot read projections of {options.projected_dtype}'
        return None

    def states_shape(
        self, batch: int, length: int, states: int, channels: int
    ) -> tuple[int, ...]:
        """Shape of the states that are saved for one direction."""
        raise NotImplementedError

    def saved_like(
        self, inputs: BidirectionalInputs, options: BidirectionalOptions
    ) -> tuple[Tensor, ...]:
        """The sum before the gate, projections and states of both directions."""
        x = inputs.x
        batch, channels, length = x.shape
        projected = [
            x.new_empty(batch, length, rows, dtype=options.projected_dtype)
            for rows in (len(direction.x_proj_weight) for direction in inputs[2:])
        ]
        states = inputs.forward.A.shape[1]
        shape = (2, *self.states_shape(batch, length, states, channels))
        y = x.new_empty(batch, length, channels, dtype=torch.float32)
        return (y, *projected, x.new_empty(shape, dtype=torch.float32))
