"""Functions, sums and products with the same bits at any number of threads.

torch cuts an array into one piece for each thread. Its vectorised kernels finish a
piece with a scalar loop. For softplus, sigmoid and SiLU this loop rounds differently
from the vector code, so a value depends on where the cuts are. The functions here use
operations that round in the same way in both (exp, log1p, + - * /).

The libraries behind torch's matrix products may divide a long sum among threads. How
long such a sum is depends on the processor. So no library gets a sum of more than a
fixed number of terms here. We cut longer sums into pieces and add these up in order.
The tests ``tests/ops/test_long_sums.py`` and ``tests/ops/test_determinism.py`` show for
which calls these limits hold, and what happens without them.

On other devices than the CPU, products, softplus, sigmoid and SiLU are torch's own,
with one kernel for each.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mmvssm.ops.typed import apply, is_tracing

# Terms of the longest sum that a library gets. We saw that sums are divided among
# threads by MKL from 192 terms on, and by oneDNN from 512 terms on in 16 bits and for a
# single row, in other cases from 20,000 terms on.
BLAS_TERMS = 128
HALF_TERMS = 384
ONEDNN_TERMS = 4096
# For larger x, softplus(x) is x, also in float64.
_LINEAR = 40
# MKL may round the last columns differently if they do not fill its vectors.
_COLUMNS = 16


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), with a small relative error for any x."""
    if x.device.type != 'cpu':
        return F.softplus(x, threshold=_LINEAR)
    # (x + |x|) / 2 is max(x, 0) with the right derivative at 0.
    magnitude = x.abs()
    return (x + magnitude) / 2 + torch.log1p(torch.exp(-magnitude))


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    if x.device.type != 'cpu':
        return torch.sigmoid(x)
    # Where exp(-x) would be infinite the result is 0, and so is its gradient, not NaN.
    least = -0.99 * math.log(torch.finfo(x.dtype).max)
    return torch.where(x < least, 0, 1 / (1 + torch.exp(-x.clamp(min=least))))


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, with a small relative error also far below 0."""
    positive = x.relu()
    return positive + (x - positive).exp()


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)."""
    if x.device.type != 'cpu':
        return F.silu(x)
    return x * sigmoid(x)


def sum_rows(x: Tensor) -> Tensor:
    """Sum of a (batch, position, ...) tensor over its first two axes."""
    if x.shape[2:].numel() == 1:
        # torch divides a sum to a single number among threads.
        return x.expand(*x.shape[:-1], 2).sum((0, 1))[..., :1]
    return x.sum((0, 1))


def linear_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias without gradients.

    float32 goes to oneDNN, which torch has besides its BLAS. The BLAS is MKL, which
    uses the widest vectors only on Intel's processors.

    Args:
        x: (..., K), any strides.
        weight: (N, K) of the same dtype, any strides.
        bias: (N,) of the same dtype.

    Returns:
        (..., N), perhaps a view of a tensor with more columns. Sums of more than
        ``BLAS_TERMS`` 16-bit numbers are computed in float32.
    """
    if x.device.type != 'cpu' or not x.numel() or not weight.numel():
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if x.dtype == torch.float32 and _has_onednn():
        first, *others = list(_pieces(x.shape[-1], ONEDNN_TERMS))
        out = _onednn_product(rows[:, first], weight[:, first], bias)
        for terms in others:
            out.add_(_onednn_product(rows[:, terms], weight[:, terms], None))
    else:
        out = _blas_product(rows, weight, bias)
    return out.unflatten(0, x.shape[:-1]) if x.ndim != 2 else out


def product_of_columns(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b for (L, M) and (L, N) of the same dtype, without gradients.

    torch copies the first factor for oneDNN if it is transposed. So the smaller one
    comes first, if that is worth the copy of the result.
    """
    if len(a) * a.shape[1] > len(b) * b.shape[1] + a.shape[1] * b.shape[1]:
        return linear_product(b.t(), a.t()).t()
    return linear_product(a.t(), b.t())


def _onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if len(x) == 1:
        # A product with a single row uses another routine, which cuts shorter sums,
        # too.
        return _onednn_product(x.expand(2, -1), weight, bias)[:1]
    if len(weight) == 1:
        bias = None if bias is None else bias.expand(2)
        return _onednn_product(x, weight.expand(2, -1), bias)[:, :1]
    found: Tensor = torch.ops.mkldnn._linear_pointwise(
        _dense(x), _dense(weight), bias, 'none', [], ''
    )
    return found


def _blas_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    columns = len(weight)
    longest = BLAS_TERMS
    if x.dtype.itemsize == 2:
        # oneDNN computes products in 16 bits.
        longest = HALF_TERMS
    else:
        weight = F.pad(weight, (0, 0, 0, -columns % _COLUMNS))
    out = _in_pieces(torch.matmul, x, weight.t(), longest)[:, :columns]
    return out if bias is None else out + bias


def without_values(x: Tensor) -> bool:
    """Whether a graph is made, or FLOPs are counted.

    Pieces would tie a graph to one size, and the FLOP counter must see whole products.
    """
    traced = torch.compiler.is_compiling() or is_tracing()
    return traced or isinstance(x, FakeTensor)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b for (..., M, K) and (..., K, N) with the same leading axes; no gradients."""
    if a.device.type != 'cpu' or without_values(a):
        return a @ b
    return _in_pieces(_short_matmul, a, b, BLAS_TERMS)


class _Product(torch.autograd.Function):
    """:func:`matmul`, whose gradients are such products again."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return matmul(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return product(grad, b.mT), product(a.mT, grad)


def product(a: Tensor, b: Tensor) -> Tensor:
    """:func:`matmul` with gradients."""
    # Tracers can record products, but not an autograd function.
    traced = torch.compiler.is_compiling() or is_tracing()
    if a.device.type != 'cpu' or traced:
        return a @ b
    return apply(_Product, a, b)


def _short_matmul(a: Tensor, b: Tensor) -> Tensor:
    # A product with a vector uses another routine of the BLAS. It rounds its last rows
    # differently if a thread begins with them.
    if b.shape[-1] == 1:
        return (a * b.mT).sum(-1, keepdim=True)
    if a.shape[-2] == 1:
        return (a.mT * b).sum(-2, keepdim=True)
    return a @ b


def _in_pieces(
    product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, longest: int
) -> Tensor:
    """a b by products with sums of at most ``longest`` terms, added up in order.

    Pieces of equal length are computed together, and added up at least in float32.
    """
    terms = a.shape[-1]
    if terms <= longest:
        return product(a, b)
    whole = terms // longest
    size = (whole, longest)
    pieces = product(
        a[..., : whole * longest].unflatten(-1, size).movedim(-2, -3),
        b[..., : whole * longest, :].unflatten(-2, size),
    )
    dtype = torch.promote_types(a.dtype, torch.float32)
    out = pieces.select(-3, 0).to(dtype)
    for number in range(1, whole):
        out = out + pieces.select(-3, number)
    if terms % longest:
        out = out + product(a[..., whole * longest :], b[..., whole * longest :, :])
    return out.to(a.dtype)


def _pieces(terms: int, longest: int) -> Iterator[slice]:
    """Cut a sum into pieces that depend on its length only."""
    for start in range(0, terms, longest):
        yield slice(start, min(start + longest, terms))


def _dense(x: Tensor) -> Tensor:
    """The tensor with strides for which oneDNN has its fast kernels."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def _has_onednn() -> bool:
    return bool(
        torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, '_linear_pointwise')
    )
