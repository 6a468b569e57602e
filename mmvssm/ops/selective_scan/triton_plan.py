"""What the Triton kernels of the selective scan are told of a call."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmvssm.ops.deterministic_math import linear_product
from mmvssm.ops.triton import tiles
from mmvssm.ops.triton.arrays import array


class Inputs(NamedTuple):
    """Inputs of a scan, or their gradients.

    Attributes:
        u: (B, D, L).
        delta: Steps (B, D, L) before bias and softplus, or with a
            ``delta_weight`` their low-rank form (B, R, L).
        A: (D, N).
        B, C: (B, G, N, L).
        D: (D,) or None.
        z: (B, D, L) or None.
        delta_bias: (D,) or None.
        delta_weight: (D, R), steps are its products with ``delta``, or None.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    delta_bias: Tensor | None = None
    delta_weight: Tensor | None = None

    def arrays(self) -> 'Inputs':
        """The same as kernels take them."""
        return Inputs._make(array(x) for x in self)


class Work(NamedTuple):
    """How a call is divided among programs, and the sequence they walk along.

    Attributes:
        batch, groups: As in the inputs.
        group_size: Channels of a group.
        tiles, stretches: Of the channels of a group and of the sequence.
        length: Positions.
        stretch_length: Positions of a stretch, a multiple of the chunk.
        height, width: Of the map that is scanned, a single row if it is none.
        table: int32 (length,), the places of the positions, see
            ``triton_kernels.py``; None if a route is walked.
    """

    batch: int
    groups: int
    group_size: int
    tiles: int
    stretches: int
    length: int
    stretch_length: int
    height: int
    width: int
    table: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """How one call is computed.

    Attributes:
        work: See there.
        states: States of a channel.
        tile: The share of a program.
        softplus: Whether steps go through softplus.
        rank: Of the steps, 0 if they are given as they are.
        route: The order of the positions, see ``triton_kernels.py``; 0 with a table.
        scale: Factor of the gate z.
    """

    work: Work
    states: int
    tile: tiles.ScanTile
    softplus: bool
    rank: int
    route: int
    scale: float

    @classmethod
    def of(
        cls,
        inputs: Inputs,
        softplus: bool,
        *,
        backward: bool = False,
        height: int = 1,
        route: int = 0,
        table: Tensor | None = None,
        scale: float = 1.0,
    ) -> 'Plan':
        """The plan for these inputs, of the forward or the backward pass."""
        batch, channels, places = inputs.u.shape
        length = places if table is None else len(table)
        groups, states = inputs.B.shape[1:3]
        group_size = channels // groups
        tile = tiles.scan_tile(states, group_size, backward)
        count = -(-group_size // tile.channels)
        wanted = -(-tiles.SCAN_PROGRAMS // (batch * groups * count))
        stretches = max(1, min(wanted, length // tiles.SHORTEST_STRETCH))
        chunk = tiles.SCAN_CHUNK
        stretch_length = -(-length // (stretches * chunk)) * chunk
        stretches = -(-length // stretch_length)
        work = Work(
            batch=batch,
            groups=groups,
            group_size=group_size,
            tiles=count,
            stretches=stretches,
            length=length,
            stretch_length=stretch_length,
            height=height,
            width=places // height,
            table=table,
        )
        weight = inputs.delta_weight
        rank = 0 if weight is None else weight.shape[1]
        return cls(
            work=work,
            states=states,
            tile=tile,
            softplus=softplus,
            rank=rank,
            route=route,
            scale=scale,
        )

    @property
    def channels(self) -> int:
        return self.work.groups * self.work.group_size

    def grid(self) -> tuple[int]:
        work = self.work
        return (work.batch * work.groups * work.tiles * work.stretches,)

    def state_block(self) -> dict[str, int]:
        """Constants of every kernel."""
        return dict(
            STATES=self.states,
            BLOCK_N=tiles.power_of_two(self.states),
            BLOCK_D=self.tile.channels,
            num_warps=self.tile.warps,
        )

    def constants(self) -> dict[str, int]:
        """Constants of the kernels that walk along the sequence."""
        return dict(
            **self.state_block(),
            CHUNK=tiles.SCAN_CHUNK,
            SOFTPLUS=self.softplus,
            RANK=self.rank,
            ROUTE=self.route,
        )

    def new_states(self, like: Tensor) -> Tensor:
        """Memory for a state of every stretch, (stretches, B, D, N)."""
        shape = (self.work.stretches, self.work.batch, self.channels, self.states)
        return like.new_empty(shape, dtype=torch.float32)

    def new_totals(self, like: Tensor) -> Tensor:
        """Memory for a number of every stretch and channel, (stretches, B, D)."""
        shape = (self.work.stretches, self.work.batch, self.channels)
        return like.new_empty(shape, dtype=torch.float32)


def saved_states_shape(
    batch: int, length: int, states: int, channels: int
) -> tuple[int, int, int, int]:
    """Shape of what forward keeps: the state before each chunk but the first."""
    return (-(-length // tiles.SCAN_CHUNK) - 1, batch, channels, states)


def low_rank_steps(
    low_rank: Tensor, weight: Tensor, states: int
) -> tuple[Tensor, Tensor | None]:
    """``delta`` and ``delta_weight`` of :class:`Inputs` for steps of low rank.

    Args:
        low_rank: (B, L, R).
        weight: (D, R), the steps are its products with ``low_rank``.
        states: Of a channel.
    """
    if weight.shape[1] * states <= tiles.LARGEST_RANK_IN_SCAN:
        return low_rank.mT, weight
    return linear_product(low_rank, weight.to(low_rank.dtype)).mT, None


def low_rank_gradients(
    grad_steps: Tensor, low_rank: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of what :func:`low_rank_steps` takes.

    Args:
        grad_steps: Gradient of the steps (B, D, L), of the dtype of ``low_rank``.
        low_rank, weight: As there.

    Returns:
        (B, L, R) in the dtype of ``low_rank``, and (D, R) in that of ``weight``.
    """
    rows = grad_steps.mT.flatten(0, 1)
    by_low_rank = linear_product(rows, weight.to(rows.dtype).t())
    by_weight = linear_product(rows.t(), low_rank.flatten(0, 1).t())
    return by_low_rank.unflatten(0, low_rank.shape[:2]), by_weight.to(weight.dtype)
