"""What the CUDA kernels of the selective scan are told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass
class Scan:
    """Inputs of the selective scan of a map along one order.

    Attributes:
        u: (B, D, L), in the order of the image.
        A: (D, N).
        B, C: (B, G, N, L).
        delta: (B, D, L), or None with ``dt_low_rank``.
        D, bias: (D,) or None.
        z: (B, D, L) or None.
        dt_low_rank: Low-rank form of delta (B, R, L), or None with ``delta``.
        dt_weight: From it to delta (D, R).
        softplus: Whether delta goes through softplus.
        width: Of the map; 0 for a plain sequence.
        route: The order of the positions: 0 row by row (so is a plain sequence), 1
            column by column, 2 and 3 the same from the end.
        order: int32 (length,), contiguous: the order in place of a route, with -1
            for a padded place, or None.
    """

    u: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    delta: Tensor | None = None
    D: Tensor | None = None
    z: Tensor | None = None
    bias: Tensor | None = None
    dt_low_rank: Tensor | None = None
    dt_weight: Tensor | None = None
    softplus: bool = True
    width: int = 0
    route: int = 0
    order: Tensor | None = None

    @property
    def length(self) -> int:
        """Positions, padded ones too."""
        return self.u.shape[2] if self.order is None else len(self.order)


def turns(scans: Sequence[Scan]) -> list[int]:
    """Numbers of a map's scans in the order in which they add up.

    Each route is followed by the same one from its end, which begins where the caches
    still hold what the one before has read and written.
    """
    return sorted(range(len(scans)), key=lambda k: scans[k].route % 2)


def sum_for(out: Tensor) -> Tensor:
    """A float32 sum of what adds up to an output, which may be that itself."""
    if out.dtype == torch.float32:
        return out
    return torch.empty_like(out, dtype=torch.float32)


class ScanKernels(Protocol):
    """What a module of kernels has, for some numbers of states."""

    def saved_shape(
        self, batch: int, length: int, states: int, channels: int
    ) -> tuple[int, ...]:
        """Shape of the float32 states that forward keeps for backward."""

    def forward(
        self,
        scan: Scan,
        out: Tensor,
        last_state: Tensor | None = None,
        saved: Tensor | None = None,
        add: Tensor | None = None,
    ) -> None:
        """Put the kernels of the forward pass onto the stream.

        Args:
            scan: The inputs.
            out: (B, D, L), to be written.
            last_state: float32 (B, D, N), to be written unless None.
            saved: See :meth:`saved_shape`, to be written unless None.
            add: float32 (B, D, L) to be added before the gate, which may be ``out``.
        """

    def backward(
        self,
        scan: Scan,
        saved: Tensor,
        grad_out: Tensor,
        grad_last_state: Tensor | None,
        rows: tuple[Tensor, Tensor, Tensor | None],
        add: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Put the kernels of the backward pass onto the stream.

        Args:
            scan: The inputs, with ``delta``.
            saved: What the forward pass kept.
            grad_out: (B, D, L).
            grad_last_state: (B, D, N), None for zero.
            rows: Gradients of u, delta and z (B, D, L), to be written.
            add: Add to what is in the gradient of u.

        Returns:
            Gradients of A (D, N), B and C (B, G, L, N), D and bias (D,).
        """
