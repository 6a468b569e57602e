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
    weight = weight.to(dtype)
    if len(weight) == 1:
        # The gradient of one weight is a sum to a single number, which torch splits
        # among threads. Two columns give the same norm.
        twice = total.expand(*total.shape[:-1], 2)
        out = F.rms_norm(twice, (2,), weight.expand(2), eps)[..., :1]
    else:
        out = F.rms_norm(total, weight.shape, weight, eps)
    return out.to(out_dtype), total.to(residual_dtype)
