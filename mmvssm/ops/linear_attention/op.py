"""Attention without the softmax, in time linear in the length."""

import torch
from torch import Tensor

from mmvssm.ops import autocast, backends
from mmvssm.ops.contract import Call
from mmvssm.ops.linear_attention.cpu_backend import CpuAttention
from mmvssm.ops.linear_attention.cuda_backend import CudaAttention
from mmvssm.ops.linear_attention.declaration import (
    LINEAR_ATTENTION,
    AttentionInputs,
    AttentionOptions,
)
from mmvssm.ops.linear_attention.linear_form import LinearForm
from mmvssm.ops.linear_attention.reference import ReferenceAttention

LINEAR_ATTENTION.supply(
    CpuAttention(),
    CudaAttention(),
    LinearForm(backends.TORCH),
    ReferenceAttention(),
    composed=lambda name: LinearForm(backends.suppliers[name]),
)


def _result(outputs: tuple[Tensor, ...], options: AttentionOptions) -> Tensor:
    return outputs[0]


@LINEAR_ATTENTION.public(finish=_result)
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int = 1,
    rotary: tuple[Tensor, Tensor] | None = None,
    *,
    normalise: bool = True,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Call:
    r"""Attend to all positions at once (arXiv 2006.16236, as in arXiv 2405.16605).

    With :math:`\phi(x) = \mathrm{elu}(x) + 1` and the rotation :math:`R_i` of
    position i, in each head

    .. math::
        y_i = \frac{\frac{1}{L} \sum_j
                    \langle R_i \phi(q_i), R_j \phi(k_j) \rangle \, v_j}
                   {\langle \phi(q_i), \frac{1}{L} \sum_j \phi(k_j) \rangle
                    + \epsilon}.

    The normaliser has no rotation, because with a rotation it could become zero. Sums
    over j that do not depend on i are computed once. So time and memory grow no faster
    than L.

    Args:
        q: Queries before :math:`\phi` (B, L, C), any strides, float32,
            bfloat16, float16 or float64.
        k: Keys before :math:`\phi`, of q's shape.
        v: Values (B, L, C'). C' and the dtype may differ from those of q.
        heads: Number of heads. Each has C / heads and C' / heads neighbouring
            channels.
        rotary: Cosine and sine (L, C / 2) of the angles by which pairs of neighbouring
            channels are rotated; see :func:`mmvssm.layers.rotary_tables`. They get no
            gradient.
        normalise: Divide by the normaliser. Without it y is the numerator,
            still a mean over j.
        eps: :math:`\epsilon`.
        backend: ``'reference'``: the definition with the L x L matrix of weights.
            ``'cpu'``: compiled kernels. ``'cuda'``: our kernels, for heads of up to 64
            channels. Any other of :func:`mmvssm.ops.list_backends`: the same tensor
            code for all of them. See :func:`mmvssm.ops.selective_scan`.

    Returns:
        (B, L, C') in v's dtype, under autocast in float32. Everything is
        computed in float32 (float64 for a float64 input).

    Raises:
        TypeError: q, k or v is not floating-point.
        ValueError: A shape does not fit.
    """
    _check(q, k, v, heads, rotary)
    dtype = torch.float32
    for x in (q, k, v):
        dtype = torch.promote_types(dtype, x.dtype)
    out_dtype = dtype if autocast.is_enabled(v) else v.dtype
    tables: tuple[Tensor | None, Tensor | None] = (None, None)
    if rotary is not None:
        cos, sin = rotary
        tables = cos.detach().to(dtype), sin.detach().to(dtype)
    options = AttentionOptions(heads, normalise, eps, dtype, out_dtype)
    return Call(AttentionInputs(q, k, v, *tables), options, backend)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    rotary: tuple[Tensor, Tensor] | None,
) -> None:
    if not all(x.is_floating_point() for x in (q, k, v)):
        raise TypeError(
            f'linear_attention: q, k and v must be floating-point, got {q.dtype}, '
            f'{k.dtype} and {v.dtype}'
        )
    if q.ndim != 3 or q.numel() == 0 or k.shape != q.shape:
        raise ValueError(
            f'linear_attention: q and k must have one shape (batch, length, '
            f'channels) with no empty side, got {tuple(q.shape)} and {tuple(k.shape)}'
        )
    if v.ndim != 3 or v.numel() == 0 or v.shape[:2] != q.shape[:2]:
        raise ValueError(
            f'linear_attention: v must be (batch, length, channels) with the batch '
            f'and length of q {tuple(q.shape)}, got {tuple(v.shape)}'
        )
    _, length, channels = q.shape
    if heads < 1 or channels % heads or v.shape[2] % heads:
        raise ValueError(
            f'linear_attention: heads must divide the channels of q and v, '
            f'{channels} and {v.shape[2]}, got {heads}'
        )
    if rotary is None:
        return
    shapes = [tuple(table.shape) for table in rotary]
    if channels // heads % 2 or shapes != [(length, channels // 2)] * 2:
        raise ValueError(
            f'linear_attention: rotary must be two tables (length, channels / 2) '
            f'= ({length}, {channels / 2:g}), with whole pairs of channels in each '
            f'of the {heads} heads, got {shapes}'
        )
