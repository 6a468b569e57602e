"""Two-dimensional rotary position embeddings (arXiv 2104.09864), as tables."""

import math

import torch
from torch import Tensor

from mmvssm.layers.tables import cached_table, work_place

# Bits of the coarse part of a frequency: its products with positions below 2**12 are
# exact in float32.
_BITS = 12


@cached_table
def rotary_angles(
    height: int,
    width: int,
    channels: int,
    grid: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Angles by which pairs of channels are rotated, as in Vim.

    The angles of the first half of the channels depend on the row, those of the second
    half on the column. A map of any size is scaled to the grid of pre-training, and a
    position is counted in patches of that grid.

    Args:
        height, width: Size of the map.
        channels: C, a multiple of 4.
        grid: Rows and columns in pre-training.
        device, dtype: Device and dtype of the result.

    Returns:
        (height * width, C / 2), one angle for two neighbouring channels.
    """
    place = work_place(device, dtype)
    rows, columns = (
        sum(_angles(size, extent, channels // 2, *place))
        for size, extent in ((height, grid[0]), (width, grid[1]))
    )
    return _on_map(rows, columns).to(device, dtype)


@cached_table
def rotary_tables(
    height: int, width: int, channels: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Cosine and sine of the angles by which channels are rotated, as in MLLA.

    The angles are those of :func:`rotary_angles`, but rows and columns are counted in
    the map itself.

    Args:
        height, width: Size of the map.
        channels: C, a multiple of 4.
        device, dtype: Of the result.

    Returns:
        (2, height * width, C / 2), for :func:`mmvssm.ops.linear_attention`.
    """
    place = work_place(device, dtype)
    cosines, sines = [], []
    for size in (height, width):
        a, b = _angles(size, None, channels // 2, *place)
        cosines.append(a.cos() * b.cos() - a.sin() * b.sin())
        sines.append(a.sin() * b.cos() + a.cos() * b.sin())
    return torch.stack((_on_map(*cosines), _on_map(*sines))).to(device, dtype)


def _angles(
    size: int, extent: int | None, half: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Angles along an axis (size, half / 2), as a sum that is exact in float32, too.

    Args:
        size: Number of places.
        extent: What their distance is scaled to, or None for ``size``.
        half: Channels that this axis rotates.
        device, dtype: Of the result.
    """
    frequencies = [10000.0 ** -(channel / half) for channel in range(0, half, 2)]
    coarse = [_coarse(frequency) for frequency in frequencies]
    rest = [a - b for a, b in zip(frequencies, coarse)]
    whole = torch.arange(size, device=device)
    part = None
    if extent is not None:
        scaled = whole * extent
        whole = scaled // size
        part = (scaled - whole * size).to(dtype)[:, None] / size
    whole = whole.to(dtype)[:, None]
    options = dict(device=device, dtype=dtype)
    a = whole * torch.tensor(coarse, **options)
    b = whole * torch.tensor(rest, **options)
    if part is not None:
        b = b + part * torch.tensor(frequencies, **options)
    return a, b


def _coarse(frequency: float) -> float:
    """The first bits of a number up to 1."""
    step = 2.0 ** (math.frexp(frequency)[1] - _BITS)
    return math.floor(frequency / step) * step


def _on_map(rows: Tensor, columns: Tensor) -> Tensor:
    """(H, n) for rows and (W, n) for columns -> (H * W, 2 n)."""
    rows = rows[:, None].expand(-1, columns.shape[0], -1)
    columns = columns[None].expand(rows.shape[0], -1, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)
