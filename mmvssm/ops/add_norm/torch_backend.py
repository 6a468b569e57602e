"""Residual addition and RMS norm with torch's own norm."""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_rms_norm_torch(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See :func:`mmvssm.ops.add_norm.reference.add_rms_norm_reference`."""
    dtype = torch.promote_types(residual_dtype, torch.float32)
    total = x.to(dtype)
    if residual is not None:
        total = total + residual.to(dtype)
    out = F.rms_norm(total, weight.shape, weight.to(dtype), eps)
    return out.to(out_dtype), total.to(residual_dtype)
