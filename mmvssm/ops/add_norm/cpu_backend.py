"""Residual addition and RMS norm by compiled CPU kernels, forward and backward."""

from ctypes import byref

import torch
from torch import Tensor

from mmvssm.ops import backends
from mmvssm.ops.add_norm.declaration import (
    FusedNorm,
    NormInputs,
    NormOptions,
    new_gradients,
    outputs_like,
)
from mmvssm.ops.contract import Result
from mmvssm.ops.cpu import library
from mmvssm.ops.cpu.library import Array, NormArgs
from mmvssm.ops.kernel_args import pointer
from mmvssm.ops.typed import MaybeTensor


class CpuNorm(FusedNorm):
    """One pass over the rows forward, one backward."""

    supplier = backends.CPU
    dtypes = (torch.float32, torch.bfloat16)

    def forward(self, inputs: NormInputs, options: NormOptions, keep: bool) -> Result:
        """See :func:`mmvssm.ops.add_rms_norm`."""
        x, residual = _rows(inputs.x), _rows(inputs.residual)
        weight = inputs.weight.float().contiguous()
        out, total = outputs_like(inputs, options)
        args = NormArgs(
            rows=x.shape[0],
            channels=x.shape[1],
            eps=options.eps,
            x=Array.of(x),
            residual=Array.of(residual),
            weight=pointer(weight),
            total=Array.of(_rows(total)),
            out=Array.of(_rows(out)),
        )
        library.kernel('norm_forward')(byref(args), library.parallel_for())
        return Result((out, total), has_nan=False)

    def backward(
        self,
        inputs: NormInputs,
        options: NormOptions,
        saved: tuple[Tensor, ...],
        grads: tuple[Tensor | None, ...],
        wanted: NormInputs,
    ) -> NormInputs:
        """Gradients of x, residual and weight."""
        x, residual = _rows(inputs.x), _rows(inputs.residual)
        grad_out, grad_total = (_rows(grad) for grad in grads)
        weight = inputs.weight.float().contiguous()
        rows, channels = x.shape
        found = new_gradients(inputs, options)
        blocks = -(-rows // library.norm_rows())
        by_block = weight.new_empty(blocks, channels)
        args = NormArgs(
            rows=rows,
            channels=channels,
            eps=options.eps,
            x=Array.of(x),
            residual=Array.of(residual),
            weight=pointer(weight),
            grad_out=Array.of(grad_out),
            grad_total=Array.of(grad_total),
            grad_x=Array.of(_rows(found.x)),
            grad_residual=Array.of(_rows(found.residual)),
            grad_weight=pointer(by_block),
        )
        library.kernel('norm_backward')(byref(args), library.parallel_for())
        return found._replace(weight=by_block.sum(0))


def _rows(x: MaybeTensor) -> MaybeTensor:
    """The tensor as (rows, channels), channels contiguous."""
    if x is None:
        return None
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
