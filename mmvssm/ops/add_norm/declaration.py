"""Declaration of the residual addition with RMS norm."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmvssm.ops.contract import KernelBackend
from mmvssm.ops.operator import Op


class NormInputs(NamedTuple):
    """Inputs of an addition and norm.

    Attributes:
        x: Branch (..., C).
        weight: Scale (C,).
        residual: Residual stream of x's shape, or None.
    """

    x: Tensor
    weight: Tensor
    residual: Tensor | None


class NormOptions(NamedTuple):
    """Options of an addition and norm.

    Attributes:
        eps: Added to the mean square.
        x_dtype: Dtype of x and of the norm.
        residual_dtype: Dtype of the residual stream; that of x if there is none.
        total_dtype: Dtype of the new residual stream.
        has_residual: Whether there is a residual stream.
    """

    eps: float
    x_dtype: torch.dtype
    residual_dtype: torch.dtype
    total_dtype: torch.dtype
    has_residual: bool


def outputs_like(inputs: NormInputs, options: NormOptions) -> tuple[Tensor, ...]:
    """Memory for the norm and the new residual stream."""
    x = inputs.x
    return (
        x.new_empty(x.shape, dtype=options.x_dtype),
        x.new_empty(x.shape, dtype=options.total_dtype),
    )


def _keep(
    inputs: NormInputs, outputs: tuple[Tensor, ...], options: NormOptions
) -> NormInputs:
    # The next block keeps the stream anyway. In float32 it is the exact sum.
    if options.total_dtype == torch.float32:
        return NormInputs(outputs[1], inputs.weight, None)
    return inputs


def new_gradients(kept: NormInputs, options: NormOptions) -> NormInputs:
    """Memory for gradients of the sum, and the weight."""
    x, weight, _ = kept
    residual = None
    # Both terms of the sum have the same gradient, if they have the same dtype.
    if options.has_residual and options.residual_dtype != options.x_dtype:
        residual = x.new_empty(x.shape, dtype=options.residual_dtype)
    by_x = x.new_empty(x.shape, dtype=options.x_dtype)
    return NormInputs(by_x, weight, residual)


def _spread(grads: NormInputs, options: NormOptions) -> NormInputs:
    if options.has_residual and grads.residual is None:
        return grads._replace(residual=grads.x)
    return grads


ADD_RMS_NORM = Op(
    'add_rms_norm',
    NormInputs,
    NormOptions,
    returns=('y', 'stream'),
    outputs_like=outputs_like,
    # The FLOP counters of the published models do not count RMS norms.
    flops=lambda shapes, options: [],
    axes=dict(x=(0, -2), residual=(0, -2)),
    keep=_keep,
    gradients_like=new_gradients,
    spread=_spread,
)


class FusedNorm(KernelBackend):
    """Base of backends whose kernels add and normalise in one pass.

    Attributes:
        dtypes: Dtypes of x and the stream that the kernels can read.
    """

    dtypes: tuple[torch.dtype, ...]

    def refuses(self, inputs: NormInputs, options: NormOptions) -> str | None:
        """It refuses empty inputs, and a stream that the kernels cannot read."""
        if not inputs.x.numel():
            return 'its input is empty'
        if options.residual_dtype not in self.dtypes:
            return f'it cannot read a residual stream of {options.residual_dtype}'
        return None
