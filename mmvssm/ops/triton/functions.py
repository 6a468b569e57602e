"""Functions of Triton kernels. Needs Triton at import.

All arithmetic is float32. Values are cast right after every load: Triton's
interpreter computes on the bits of a bfloat16 as if they were an integer.
"""

from collections.abc import Callable
from typing import Any, Protocol

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)


class Kernel(Protocol):
    """What Triton makes of a function: others call it, or it is launched on a grid."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]: ...


# Triton's own decorator, which has no types for a checker to read.
jit: Callable[[Callable[..., Any]], Kernel] = triton.jit


@jit
def nothing() -> Any:
    """The empty tuple, to begin with: a literal one would be of a type of its own."""
    return ()


@jit
def load(pointers: tl.tensor, mask: tl.tensor) -> Any:
    """Values as float32, zero where the mask is False."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@jit
def softplus(x: tl.tensor) -> Any:
    """log(1 + exp(x)), accurate in relative terms for any x.

    The larger part is max(x, 0). The other is log(1 + e), e = exp(-abs(x)), as
    2 artanh(s), s = e / (2 + e) <= 1/3, by a polynomial (4e-9, fitted at the
    Chebyshev nodes): log() of 1 + e would lose the digits of a small e.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    q = s * s
    p = 0.28157778
    p = p * q + 0.27965158
    p = p * q + 0.40024595
    p = p * q + 0.66666324
    p = p * q + 2.0
    return tl.maximum(x, 0.0) + s * p


@jit
def sigmoid(x: tl.tensor) -> Any:
    """1 / (1 + exp(-x)), without an overflow for any x."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)
