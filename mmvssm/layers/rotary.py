"""Two-dimensional rotary position embedding (arXiv 2104.09864) as in Vim."""

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
    """Angles by which pairs of channels turn.

    The first half of the channels turns with the row, the second one with the
    column. A position is counted in patches of the grid of pre-training, over
    which a map of any size is stretched.

    Args:
        height, width: Size of the map.
        channels: C, a multiple of 4.
        grid: Rows and columns in pre-training.
        device, dtype: Of the result.

    Returns:
        (height * width, C / 2), one angle for two neighbouring channels.
    """
    # On the CPU in float64: some devices do not have it.
    half = channels // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float64) / half
    rows, columns = (
        (torch.arange(size, dtype=torch.float64) / size * extent)[:, None]
        * 10000.0**-exponents
        for size, extent in zip((height, width), grid)
    )
    rows = rows[:, None].expand(-1, width, -1)
    columns = columns[None].expand(height, -1, -1)
    angles = torch.cat((rows, columns), dim=-1).flatten(0, 1)
    return angles.to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of neighbouring channels.

    Args:
        x: (B, L, C).
        cos, sin: Cosine and sine of the angles, (L, C / 2) or (1, L, C / 2).

    Returns:
        Of x's shape and dtype, computed in the dtype of the angles.
    """
    a, b = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)
