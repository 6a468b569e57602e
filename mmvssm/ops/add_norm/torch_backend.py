"""Residual addition and RMS norm with torch's own norm."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mmvssm.ops.add_norm.declaration import NormInputs, NormOptions
from mmvssm.ops.backends import Supplier
from mmvssm.ops.contract import Composed, Result


@dataclass(frozen=True)
class TorchNorm(Composed):
    """``torch.nn.functional.rms_norm`` of a sum."""

    supplier: Supplier

    def forward(self, inputs: NormInputs, options: NormOptions, keep: bool) -> Result:
        """See :func:`mmvssm.ops.add_rms_norm`; in float32, or float64 for float64."""
        x, weight, residual = inputs
        dtype = torch.promote_types(options.residual_dtype, torch.float32)
        dtype = torch.promote_types(x.dtype, dtype)
        total = x.to(dtype)
        if residual is not None:
            total = total + residual.to(dtype)
        weight = weight.to(dtype)
        if len(weight) == 1:
            # The gradient of a single weight is a sum to one number, which torch
            # divides among threads. Two equal columns give the same norm.
            twice = total.expand(*total.shape[:-1], 2)
            out = F.rms_norm(twice, (2,), weight.expand(2), options.eps)[..., :1]
        else:
            out = F.rms_norm(total, weight.shape, weight, options.eps)
        outputs = out.to(options.x_dtype), total.to(options.total_dtype)
        return Result(outputs, has_nan=False)
