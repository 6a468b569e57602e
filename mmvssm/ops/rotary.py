"""Rotation of pairs of channels, as rotary position embeddings need it."""

import torch
from torch import Tensor


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
