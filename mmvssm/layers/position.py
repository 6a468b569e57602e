"""Learned position embeddings on maps of any size."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvssm.layers.tables import cached_table
from mmvssm.ops import autocast


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
    if old == new:
        return embedding
    down, across = (_bicubic(a, b, like=embedding) for a, b in zip(old, new))
    grid = embedding.to(down.dtype).unflatten(1, old)
    with autocast.disabled(embedding):
        resized = torch.einsum('ph,bhwc->bpwc', down, grid)
        resized = torch.einsum('qw,bpwc->bpqc', across, resized)
    return resized.flatten(1, 2).to(embedding.dtype)


@cached_table
def _bicubic(old: int, new: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Weights (new, old) of the old positions in the new ones."""
    # On the CPU, because some devices do not have float64.
    one_hot = torch.eye(old, dtype=torch.float64)[None, :, :, None]
    columns = F.interpolate(one_hot, size=(new, 1), mode='bicubic', align_corners=False)
    return columns[0, :, :, 0].T.to(device, dtype).contiguous()
