"""Residual addition and RMS norm as they are defined."""

import torch
from torch import Tensor


def add_rms_norm_reference(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Add, divide by the root of the mean square (arXiv 1910.07467), scale.

    The arguments are those of :func:`mmvssm.ops.add_rms_norm`. Everything is
    computed in float32, or float64 for float64 input.
    """
    dtype = torch.promote_types(residual_dtype, torch.float32)
    total = x.to(dtype)
    if residual is not None:
        total = total + residual.to(dtype)
    mean_square = total.square().mean(-1, keepdim=True)
    out = total / torch.sqrt(mean_square + eps) * weight.to(dtype)
    return out.to(out_dtype), total.to(residual_dtype)
