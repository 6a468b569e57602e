"""Residual addition and RMS norm in one op, for blocks in pre-norm form."""

import torch
from torch import Tensor

from mmvssm.ops import backends
from mmvssm.ops.add_norm.cpu_backend import CpuNorm
from mmvssm.ops.add_norm.cuda_backend import CudaNorm
from mmvssm.ops.add_norm.declaration import ADD_RMS_NORM, NormInputs, NormOptions
from mmvssm.ops.add_norm.reference import ReferenceNorm
from mmvssm.ops.add_norm.torch_backend import TorchNorm
from mmvssm.ops.contract import Call

ADD_RMS_NORM.supply(
    CpuNorm(),
    CudaNorm(),
    ReferenceNorm(),
    composed=lambda name: TorchNorm(backends.suppliers[name]),
)


def _result(outputs: tuple[Tensor, ...], options: NormOptions) -> tuple[Tensor, Tensor]:
    y, stream = outputs
    return y, stream


@ADD_RMS_NORM.public(finish=_result)
def add_rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual_in_fp32: bool = False,
    backend: str | None = None,
) -> Call:
    r"""Add a branch to the residual stream and normalise the sum.

    .. math::
        r' = r + x, \quad y = \frac{r'}{\sqrt{\mathrm{mean}(r'^2) + \epsilon}} w

    Args:
        x: Output of the last branch (..., C), float32, bfloat16, float16 or
            float64.
        weight: Scale w (C,).
        residual: Residual stream r of x's shape, of any of these dtypes. None for the
            first block: then the stream is x.
        eps: Added to the mean square.
        residual_in_fp32: Return the stream in float32 (float64 for float64). Otherwise
            it keeps its dtype; in the first block it has that of x.
        backend: See :func:`mmvssm.ops.selective_scan`.

    Returns:
        y in x's dtype, and the stream r'. Sum and norm are computed in float32
        (float64 for float64 input), also under autocast.

    Raises:
        TypeError: x is not floating-point.
        ValueError: A shape does not fit.
    """
    _check(x, weight, residual)
    stream = x.dtype if residual is None else residual.dtype
    total = torch.promote_types(stream, torch.float32) if residual_in_fp32 else stream
    options = NormOptions(
        eps=eps,
        x_dtype=x.dtype,
        residual_dtype=stream,
        total_dtype=total,
        has_residual=residual is not None,
    )
    return Call(NormInputs(x, weight, residual), options, backend)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    if not x.is_floating_point():
        raise TypeError(f'add_rms_norm: x must be floating-point, got {x.dtype}')
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f'add_rms_norm: weight must be (channels,) for x (..., channels), got '
            f'{tuple(weight.shape)} and {tuple(x.shape)}'
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"add_rms_norm: residual must have x's shape {tuple(x.shape)}, got "
            f'{tuple(residual.shape)}'
        )
