"""Residual addition and RMS norm by Triton kernels, forward and backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmvssm.ops.triton import runtime, tiles
from mmvssm.ops.triton.arrays import array

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def forward(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See :func:`mmvssm.ops.add_rms_norm`; tensors are (rows, channels)."""
    from mmvssm.ops.add_norm import triton_kernels

    tile = tiles.norm_tile(x.shape[1])
    out, total = x.new_empty(x.shape), x.new_empty(x.shape, dtype=residual_dtype)
    with runtime.on_device_of(x):
        triton_kernels.forward_kernel[(-(-x.shape[0] // tile.rows),)](
            *(array(x), array(residual), weight.contiguous()),
            *(array(total), array(out), tuple(x.shape), eps),
            **_constants(tile),
        )
    return out, total


def backward(
    grad_out: Tensor | None,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    dtypes: Sequence[torch.dtype],
) -> list[Tensor]:
    """Gradients of the weight and of the sum, the latter in each of ``dtypes``.

    Args:
        grad_out: Gradient of the norm, None for zero.
        grad_total: Gradient of the sum, None for zero.
        x, residual: Terms of the sum, or the sum and None.
    """
    from mmvssm.ops.add_norm import triton_kernels

    rows, channels = x.shape
    tile = tiles.norm_tile(channels)
    programs = -(-rows // (tile.rows * tile.repeats))
    grads = [x.new_empty(x.shape, dtype=dtype) for dtype in dtypes]
    by_weight = weight.new_empty(programs, channels)
    with runtime.on_device_of(x):
        triton_kernels.backward_kernel[(programs,)](
            *(array(x), array(residual), weight.contiguous()),
            *(array(grad_out), array(grad_total)),
            *(tuple(array(grad) for grad in grads), by_weight),
            *((rows, channels), tile.repeats, eps),
            **_constants(tile),
        )
    return [by_weight.sum(0), *grads]


def _constants(tile: tiles.Tile) -> dict[str, int]:
    return dict(BLOCK_R=tile.rows, BLOCK_C=tile.channels, num_warps=tile.warps)
