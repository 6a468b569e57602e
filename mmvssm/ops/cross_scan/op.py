"""The four scan routes of VMamba over a map, and back (arXiv 2401.10166)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmvssm.ops.scan_orders import NUM_ROUTES


def cross_scan(x: Tensor) -> Tensor:
    """Read a map along four routes.

    Route 0 goes row by row, route 1 column by column. Routes 2 and 3 are these two from
    the end. ``scan_order('cross', H, W)`` has their places.

    Args:
        x: Map (B, C, H, W), any dtype, any strides.

    Returns:
        Sequences (B, 4, C, H * W); channels-last in memory, (B, H * W, 4, C).

    Raises:
        ValueError: ``x`` is not 4-dimensional or is empty.
    """
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(
            f'cross_scan: expected a map (batch, channels, height, '
            f'width) with no empty side, got {tuple(x.shape)}'
        )
    maps = [x.permute(0, 2, 3, 1)] * NUM_ROUTES
    return take_routes(maps).permute(0, 2, 3, 1)


def cross_merge(ys: Tensor, size: tuple[int, int]) -> Tensor:
    """Put four sequences back onto the map and add them up.

    The adjoint of :func:`cross_scan`.

    Args:
        ys: Sequences (B, 4, C, H * W), any dtype, any strides.
        size: Height and width (H, W) of the map.

    Returns:
        The sum (B, C, H * W), positions row by row; channels-last in memory.

    Raises:
        ValueError: ``ys`` is not of that shape.
    """
    height, width = size
    if (
        ys.ndim != 4
        or ys.shape[1] != NUM_ROUTES
        or ys.shape[3] != height * width
        or ys.numel() == 0
    ):
        raise ValueError(
            f'cross_merge: expected (batch, {NUM_ROUTES}, channels, '
            f'{height} * {width}), got {tuple(ys.shape)}'
        )
    row, column, row_back, column_back = ys.permute(0, 3, 1, 2).unbind(2)
    rows = row + row_back.flip(1)
    columns = column + column_back.flip(1)
    columns = columns.unflatten(1, (width, height)).transpose(1, 2)
    merged: Tensor = rows.unflatten(1, (height, width)) + columns
    return merged.flatten(1, 2).transpose(1, 2)


def take_routes(maps: Sequence[Tensor]) -> Tensor:
    """Read map k along route k.

    Args:
        maps: Four maps (B, H, W, C).

    Returns:
        Sequences (B, H * W, 4, C), contiguous.
    """
    row, column, row_back, column_back = maps
    return torch.stack(
        (
            row.flatten(1, 2),
            column.transpose(1, 2).flatten(1, 2),
            row_back.flatten(1, 2).flip(1),
            column_back.transpose(1, 2).flatten(1, 2).flip(1),
        ),
        dim=2,
    )
