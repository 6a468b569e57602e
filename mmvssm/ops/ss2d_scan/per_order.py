"""The inputs of each scan of SS2D, and the gradients of all scans together.

For backends whose kernels do one row of the scan order at a time. They read the map and
its projections in place.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class OrderInputs(NamedTuple):
    """The inputs of the scan along one row, all in the order of the map.

    Attributes:
        u: Map (B, C, L).
        dt: Low-rank step sizes (B, L, R).
        B, C: (B, 1, N, L).
        weight: From the low-rank step sizes to ``delta``, (C, R).
        bias: Added before the softplus (C,).
        A: Decay rates (C, N).
        D: Skip weights (C,).
    """

    u: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    weight: Tensor
    bias: Tensor
    A: Tensor
    D: Tensor


class OrderGradients(NamedTuple):
    """Gradients of the inputs of one row; those of B and C are (B, L, N)."""

    dt: Tensor
    B: Tensor
    C: Tensor
    weight: Tensor
    bias: Tensor
    A: Tensor
    D: Tensor


def sequence(x: Tensor) -> Tensor:
    """A map (B, H, W, C) as (B, C, H W), in the order of the map."""
    return x.flatten(1, 2).mT


def split_orders(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
) -> Iterator[OrderInputs]:
    """The inputs of an SS2D backend for each row of the scan order, as views."""
    rank, states = dt_weight.shape[2], A.shape[1]
    orders = dt_weight.shape[0]
    A, Ds = A.unflatten(0, (orders, -1)), Ds.unflatten(0, (orders, -1))
    pieces = projected.flatten(1, 2).chunk(orders, dim=2)
    for piece, *parameters in zip(pieces, dt_weight, dt_bias, A, Ds):
        dt, B, C = piece.split((rank, states, states), dim=2)
        yield OrderInputs(
            *(sequence(x), dt, B.mT.unsqueeze(1), C.mT.unsqueeze(1), *parameters)
        )


def join_gradients(projected: Tensor, scans: list[OrderGradients]) -> list[Tensor]:
    """Gradients of all inputs of an SS2D backend except the map.

    Args:
        projected: The input ``projected``.
        scans: The gradients of every row of the scan order.
    """
    columns = [
        column.to(projected.dtype)
        for scan in scans
        for column in (scan.dt, scan.B, scan.C)
    ]
    weight, bias, A, D = (
        torch.stack([getattr(scan, name) for scan in scans])
        for name in ('weight', 'bias', 'A', 'D')
    )
    return [
        torch.cat(columns, dim=2).view(projected.shape),
        *(weight, bias, A.flatten(0, 1), D.flatten()),
    ]
