"""SS2D's inputs by route, and the gradients of its routes put together.

For backends whose kernels walk one route after the other, each reading the map
and its projections where they are.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mmvssm.ops.cross_scan import NUM_ROUTES


class Route(NamedTuple):
    """What the scan along one route takes, all in the order of the image.

    Attributes:
        u: Map (B, C, L).
        dt: Low-rank form of the step sizes (B, L, R).
        B, C: (B, 1, N, L).
        weight: From the low-rank form to steps (C, R).
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


class RouteGradients(NamedTuple):
    """Gradients of what a route has of its own; those of B and C are (B, L, N)."""

    dt: Tensor
    B: Tensor
    C: Tensor
    weight: Tensor
    bias: Tensor
    A: Tensor
    D: Tensor


def sequence(x: Tensor) -> Tensor:
    """A map (B, H, W, C) as (B, C, H W) in the order of the image."""
    return x.flatten(1, 2).mT


def split_routes(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
) -> Iterator[Route]:
    """The four routes of the inputs of an SS2D backend, as views."""
    rank, states = dt_weight.shape[2], A.shape[1]
    A, Ds = A.unflatten(0, (NUM_ROUTES, -1)), Ds.unflatten(0, (NUM_ROUTES, -1))
    pieces = projected.flatten(1, 2).chunk(NUM_ROUTES, dim=2)
    for piece, *parameters in zip(pieces, dt_weight, dt_bias, A, Ds):
        dt, B, C = piece.split((rank, states, states), dim=2)
        yield Route(
            *(sequence(x), dt, B.mT.unsqueeze(1), C.mT.unsqueeze(1), *parameters)
        )


def join_gradients(projected: Tensor, routes: list[RouteGradients]) -> list[Tensor]:
    """Gradients of all inputs of an SS2D backend but the map.

    Args:
        projected: That input.
        routes: Of every route, in order.
    """
    columns = [
        column.to(projected.dtype)
        for route in routes
        for column in (route.dt, route.B, route.C)
    ]
    weight, bias, A, D = (
        torch.stack([getattr(route, name) for route in routes])
        for name in ('weight', 'bias', 'A', 'D')
    )
    return [
        torch.cat(columns, dim=2).view(projected.shape),
        *(weight, bias, A.flatten(0, 1), D.flatten()),
    ]
