"""Residual addition and RMS norm as an op: what goes in, what comes out."""

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
        residual: Stream of x's shape, or None.
    """

    x: Tensor
    weight: Tensor
    residual: Tensor | None


class NormOptions(NamedTuple):
    """Options of an addition and norm.

    Attributes:
        eps: Added to the mean square.
        x_dtype: Of x, and of the norm that comes out.
        residual_dtype: Of the stream, of x if there is none.
        total_dtype: Of the stream that comes out.
        has_residual: Whether there is a stream.
    """

    eps: float
    x_dtype: torch.dtype
    residual_dtype: torch.dtype
    total_dtype: torch.dtype
    has_residual: bool


def outputs_like(inputs: NormInputs, options: NormOptions) -> tuple[Tensor, ...]:
    """Memory for the norm and the stream."""
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
    """Memory for gradients of the sum, and the weight itself."""
    x, weight, _ = kept
    residual = None
    # One gradient serves for both terms of the sum if they share a dtype.
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
    # Counters of the published models do not see their RMS norms.
    flops=lambda shapes, options: [],
    axes=dict(x=(0, -2), residual=(0, -2)),
    keep=_keep,
    gradients_like=new_gradients,
    spread=_spread,
)


class FusedNorm(KernelBackend):
    """What backends share whose kernels add and norm in one.

    Attributes:
        dtypes: Of x and the stream, those that the kernels read.
    """

    dtypes: tuple[torch.dtype, ...]

    def refuses(self, inputs: NormInputs, options: NormOptions) -> str | None:
        """Nothing to do, or a stream that the kernels do not read."""
        if not inputs.x.numel():
            return 'there is nothing to norm'
        if options.residual_dtype not in self.dtypes:
            return f'it reads no stream of {options.residual_dtype}'
        return None
