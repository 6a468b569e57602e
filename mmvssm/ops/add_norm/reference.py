"""Residual addition and RMS norm as they are defined."""

import torch

from mmvssm.ops import backends
from mmvssm.ops.add_norm.declaration import NormInputs, NormOptions
from mmvssm.ops.contract import Composed, Result


class ReferenceNorm(Composed):
    """Add, divide by the root of the mean square (arXiv 1910.07467), scale."""

    supplier = backends.REFERENCE

    def forward(self, inputs: NormInputs, options: NormOptions, keep: bool) -> Result:
        """See :func:`mmvssm.ops.add_rms_norm`; in float32, or float64 for float64."""
        x, weight, residual = inputs
        dtype = torch.promote_types(options.residual_dtype, torch.float32)
        dtype = torch.promote_types(x.dtype, dtype)
        total = x.to(dtype)
        if residual is not None:
            total = total + residual.to(dtype)
        mean_square = total.square().mean(-1, keepdim=True)
        out = total / torch.sqrt(mean_square + options.eps) * weight.to(dtype)
        outputs = out.to(options.x_dtype), total.to(options.total_dtype)
        return Result(outputs, has_nan=False)
