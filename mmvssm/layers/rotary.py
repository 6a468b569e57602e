"""Two-dimensional rotary position embeddings (arXiv 2104.09864), as tables."""

import torch
from torch import Tensor

from mmvssm.layers.tables import cached_table


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
    return _angles(height, width, channels, grid).to(device, dtype)


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
    angles = _angles(height, width, channels, (height, width))
    return torch.stack((angles.cos(), angles.sin())).to(device, dtype)


def _angles(height: int, width: int, channels: int, grid: tuple[int, int]) -> Tensor:
    # On the CPU, because some devices do not have float64.
    half = channels // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float64) / half
    rows, columns = (
        (torch.arange(size, dtype=torch.float64) / size * extent)[:, None]
        * 10000.0**-exponents
        for size, extent in zip((height, width), grid)
    )
    rows = rows[:, None].expand(-1, width, -1)
    columns = columns[None].expand(height, -1, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)
