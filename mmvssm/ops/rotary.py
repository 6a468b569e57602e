"""Rotation of pairs of channels, as rotary position embeddings need it."""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of neighbouring channels.

    Args:
        x: (B, L, C).
        cos, sin: Cosine and sine of the angles, (L, C / 2) or (1, L, C / 2).

    Returns:
        A tensor of x's shape and dtype, computed in the dtype of the angles.
    """
    pairs = x.to(cos.dtype).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        # Neither inductor nor ONNX has complex numbers.
        a, b = pairs.unbind(-1)
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
    else:
        # As complex numbers, for speed. Cosine and sine are multiplied one by
        # one because a product of two full complex numbers is rounded in one
        # way or another, depending on where torch cuts the memory for threads.
        numbers = torch.view_as_complex(pairs.contiguous())
        zero = torch.zeros_like(cos)
        turned = numbers * torch.complex(cos, zero) + numbers * torch.complex(zero, sin)
        turned = torch.view_as_real(turned)
    return turned.flatten(-2).to(x.dtype)
