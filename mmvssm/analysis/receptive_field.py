"""Effective receptive field: how much each pixel matters to one place of the last map.

The method is that of Luo et al. (arXiv 1701.04128), in the form of RepLKNet (arXiv
2203.06717) and VMamba (arXiv 2401.10166).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvssm.analysis.tokens import compute_maps

SHARES = (0.2, 0.3, 0.5, 0.99)


class Square(NamedTuple):
    """The smallest centred square that holds a share of the gradient.

    Attributes:
        share: The share.
        side: Side of the square in pixels, odd.
        area: Its part of the image's area; where the square is larger than the image,
            that of the part inside.
    """

    share: float
    side: int
    area: float


def receptive_field(backbone: nn.Module, images: Tensor) -> Tensor:
    """Gradient of the centre of the last map with respect to the image.

    The centre is row h // 2, column w // 2. The gradient is that of the sum over
    channels of relu(map) there; its positive part is summed over batch and colours.

    Args:
        backbone: In eval mode; see :func:`mmvssm.analysis.tokens.layer_outputs`.
        images: (B, C, H, W), normalised.

    Returns:
        (H, W), not negative, in the dtype of the images.
    """
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        out = compute_maps(backbone, images)[-1].patches
        height, width = out.shape[2:]
        score = F.relu(out[:, :, height // 2, width // 2]).sum()
    (gradient,) = torch.autograd.grad(score, images)
    return F.relu(gradient).sum((0, 1))


def cumulative_shares(field: Tensor) -> Tensor:
    """Share of the gradient in growing squares round the centre.

    Args:
        field: (H, W), not negative.

    Returns:
        Shares in float64; entry i is that of the square of side 2 i + 1 round row
        H // 2 and column W // 2, as far as it is inside the image. The last one is 1.

    Raises:
        ValueError: The sum is zero or not finite, so there are no shares.
    """
    field = field.double()
    total = field.sum()
    if not (total.isfinite() and total > 0):
        raise ValueError(f'the gradients sum up to {total.item()}: there are no shares')
    ring = _rings(field)
    sums = field.new_zeros(int(ring.max()) + 1).index_add(
        0, ring.flatten(), field.flatten()
    )
    return sums.cumsum(0) / total


def squares_of(field: Tensor, shares: Sequence[float] = SHARES) -> list[Square]:
    """The smallest squares that hold more than each share of the gradient.

    As published the smallest square considered has a side of 3 pixels.

    Args:
        field: (H, W), not negative.
        shares: In (0, 1).

    Raises:
        ValueError: See :func:`cumulative_shares`.
    """
    reached = cumulative_shares(field)
    ring = _rings(field)
    found = []
    for share in shares:
        within = (reached > share).nonzero()
        i = int(within[0]) if len(within) else len(reached) - 1
        i = min(max(i, 1), len(reached) - 1)
        found.append(Square(share, 2 * i + 1, (ring <= i).double().mean().item()))
    return found


def _rings(field: Tensor) -> Tensor:
    """Distance of each pixel from the centre, the larger of rows and columns."""
    height, width = field.shape
    rows = (torch.arange(height, device=field.device) - height // 2).abs()
    columns = (torch.arange(width, device=field.device) - width // 2).abs()
    return torch.maximum(rows[:, None], columns)
