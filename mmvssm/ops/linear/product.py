"""Matrix products by oneDNN, which torch ships beside its BLAS.

For float32 torch takes the BLAS. Its MKL uses the widest vectors of a processor
only if Intel made it, and cuts a product differently for other numbers of
threads; oneDNN does neither. For bfloat16 torch takes oneDNN by itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias without gradients.

    Args:
        x: (..., K), any strides.
        weight: (N, K) of the same dtype, any strides.
        bias: (N,) of the same dtype.

    Returns:
        (..., N), contiguous.
    """
    onednn = x.device.type == 'cpu' and x.dtype == torch.float32 and _has_onednn()
    if not onednn or not x.numel():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(
        _dense(x), _dense(weight), bias, 'none', [], ''
    )


def _dense(x: Tensor) -> Tensor:
    """The tensor with strides for which oneDNN has its fast kernels."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def _has_onednn() -> bool:
    return (
        torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, '_linear_pointwise')
    )
