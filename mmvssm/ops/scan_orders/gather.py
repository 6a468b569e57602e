"""Read maps along a scan order, and put sequences back onto maps, in tensor code.

This is for backends that scan sequences. The adjoint of reading by a table is reading
by the inverse table. So gradients are read, too, and never added up by atomic additions
or
by several threads: the bits are the same at any number of threads.
"""

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvssm.ops.scan_orders.registry import Orders
from mmvssm.ops.scan_orders.tables import device_table
from mmvssm.ops.typed import apply


def read_orders(maps: Sequence[Tensor], orders: Orders) -> Tensor:
    """Read map k along row k of a scan order.

    Args:
        maps: K maps (B, H, W, C).
        orders: See :func:`mmvssm.ops.scan_order`.

    Returns:
        Sequences (B, L, K, C), contiguous, zero at padded places.
    """
    there, back = _tables(orders, maps[0])
    rows = (
        _take(x.flatten(1, 2), *tables)
        for x, *tables in zip(maps, there, back, strict=True)
    )
    return torch.stack([*rows], dim=2)


def merge_orders(ys: Tensor, orders: Orders, size: tuple[int, int]) -> Tensor:
    """Put the sequences of a scan order back onto the map and add them up.

    The adjoint of :func:`read_orders`. Values at padded places are dropped.

    Args:
        ys: Sequences (B, K, C, L).
        orders: See :func:`mmvssm.ops.scan_order`.
        size: Height and width (H, W) of the map.

    Returns:
        The sum (B, C, H * W), places row by row, in the order of K; channels-last
        in memory.
    """
    there, back = _tables(orders, ys.new_empty((1, *size, 1)))
    merged: Tensor | None = None
    for y, *tables in zip(ys.unbind(1), back, there, strict=True):
        part = _take(y.mT, *tables)
        merged = part if merged is None else merged + part
    assert merged is not None, 'a scan order has at least one row'
    return merged.mT


def _tables(orders: Orders, x: Tensor) -> tuple[Tensor, Tensor]:
    """From places to positions and back, for maps (B, H, W, C)."""
    size = index(x.shape[1]), index(x.shape[2])
    kinds = ('places', 'positions')
    there, back = (device_table(kind, orders, *size, x.device) for kind in kinds)
    return there, back


def _take(x: Tensor, taken: Tensor, inverse: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return apply(_Take, x, taken, inverse)
    return _gather(x, taken)


def _gather(x: Tensor, taken: Tensor) -> Tensor:
    if len(taken) > x.shape[1]:
        # The index of a padded place is one after the last: there is a row of zeros.
        x = F.pad(x, (0, 0, 0, 1))
    return x.index_select(1, taken)


class _Take(torch.autograd.Function):
    """Positions of x (B, positions, C) in another order.

    The order has every position once; ``inverse`` is the inverse permutation.
    """

    @staticmethod
    def forward(x: Tensor, taken: Tensor, inverse: Tensor) -> Tensor:
        return _gather(x, taken)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *tables = inputs
        ctx.save_for_backward(*tables)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        taken, inverse = ctx.saved_tensors
        return _take(grad, inverse, taken), None, None
