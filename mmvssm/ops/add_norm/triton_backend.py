"""Residual addition and RMS norm by Triton kernels, forward and backward."""

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
from mmvssm.ops.triton import runtime, tiles
from mmvssm.ops.triton.arrays import array
from mmvssm.ops.typed import MaybeTensor


class TritonNorm(FusedNorm):
    """One pass over the rows each way."""

    supplier = backends.TRITON
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def forward(self, inputs: NormInputs, options: NormOptions, keep: bool) -> Result:
        """See :func:`mmvssm.ops.add_rms_norm`."""
        from mmvssm.ops.add_norm import triton_kernels

        x, residual = _rows(inputs.x), _rows(inputs.residual)
        weight = inputs.weight.float().contiguous()
        tile = tiles.norm_tile(x.shape[1])
        out, total = outputs_like(inputs, options)
        with runtime.on_device_of(x):
            triton_kernels.forward_kernel[(-(-x.shape[0] // tile.rows),)](
                x=array(x),
                residual=array(residual),
                weight=weight,
                total=array(_rows(total)),
                out=array(_rows(out)),
                shape=tuple(x.shape),
                eps=options.eps,
                **_constants(tile),
            )
        return Result((out, total), has_nan=False)

    def backward(
        self,
        inputs: NormInputs,
        options: NormOptions,
        saved: tuple[Tensor, ...],
        grads: tuple[Tensor | None, ...],
        wanted: NormInputs,
    ) -> NormInputs:
        """Gradients of the weight and of the sum; inputs are its terms, or itself."""
        from mmvssm.ops.add_norm import triton_kernels

        x, residual = _rows(inputs.x), _rows(inputs.residual)
        grad_out, grad_total = (_rows(grad) for grad in grads)
        weight = inputs.weight.float().contiguous()
        rows, channels = x.shape
        tile = tiles.norm_tile(channels)
        programs = -(-rows // (tile.rows * tile.repeats))
        found = new_gradients(inputs, options)
        sums = [_rows(g) for g in (found.x, found.residual) if g is not None]
        by_weight = weight.new_empty(programs, channels)
        with runtime.on_device_of(x):
            triton_kernels.backward_kernel[(programs,)](
                x=array(x),
                residual=array(residual),
                weight=weight,
                grad_out=array(grad_out),
                grad_total=array(grad_total),
                grads=tuple(array(grad) for grad in sums),
                by_weight=by_weight,
                shape=(rows, channels),
                repeats=tile.repeats,
                eps=options.eps,
                **_constants(tile),
            )
        return found._replace(weight=by_weight.sum(0))


def _rows(x: MaybeTensor) -> MaybeTensor:
    """The tensor as (rows, channels)."""
    return None if x is None else x.reshape(-1, x.shape[-1])


def _constants(tile: tiles.Tile) -> dict[str, int]:
    return dict(BLOCK_R=tile.rows, BLOCK_C=tile.channels, num_warps=tile.warps)
