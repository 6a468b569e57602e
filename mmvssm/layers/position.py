"""Learned position embeddings on maps of any size."""

import torch
from torch import Tensor

from mmvssm.layers.tables import are_equal, cached_table, work_place
from mmvssm.ops import autocast

# Keys' parameter of cubic convolution, as torch has it.
_A = -0.75


def resize_position(
    embedding: Tensor, old: tuple[int, int], new: tuple[int, int]
) -> Tensor:
    """Resize a position embedding by bicubic interpolation without antialiasing.

    This is ``F.interpolate(mode='bicubic', align_corners=False)`` as two small matrix
    products. The matrices depend on the sizes only. So they can be kept, while the
    embedding changes in training.

    Args:
        embedding: (1, H * W, C), row by row.
        old: Size (H, W) of the embedding.
        new: Size (H', W') of the result.

    Returns:
        (1, H' * W', C) in the same dtype.
    """
    if are_equal(old, new):
        return embedding
    down, across = (_bicubic(a, b, like=embedding) for a, b in zip(old, new))
    grid = embedding.to(down.dtype).unflatten(1, old)
    with autocast.disabled(embedding):
        resized = torch.einsum('ph,bhwc->bpwc', down, grid)
        resized = torch.einsum('qw,bpwc->bpqc', across, resized)
    return resized.flatten(1, 2).to(embedding.dtype)


@cached_table
def _bicubic(old: int, new: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Weights (new, old) of the old positions in the new ones.

    Position i of the new ones is at (i + 1/2) old / new - 1/2 of the old ones. Whole
    numbers keep the parts of this sum exact.
    """
    place, work = work_place(device, dtype)
    doubled = (2 * torch.arange(new, device=place) + 1) * old + new
    before = doubled // (2 * new)
    beyond = (doubled - before * (2 * new)).to(work) / (2 * new)
    # Two old positions at the left and two at the right; those beyond the border are
    # the first or last one.
    offsets = torch.arange(-1, 3, device=place)
    taps = (before[:, None] - 1 + offsets).clamp(0, old - 1)
    distance = (beyond[:, None] - offsets).abs()
    weights = torch.where(distance < 1, _near(distance), _far(distance))
    chosen = taps[:, :, None] == torch.arange(old, device=place)
    return (weights[:, :, None] * chosen).sum(1).to(device, dtype).contiguous()


def _near(x: Tensor) -> Tensor:
    """Weight of an old position at a distance of 0 to 1."""
    return 1 - x * x * ((_A + 3) - (_A + 2) * x)


def _far(x: Tensor) -> Tensor:
    """Weight of an old position at a distance of 1 to 2."""
    return _A * (x - 1) * (x - 2) * (x - 2)
