"""Elementary functions and sums with the same bits at any number of threads.

torch cuts an array into one piece a thread. Its vectorised kernels finish a
piece with a scalar loop, and for softplus, sigmoid and SiLU that loop rounds
differently from the vector one, so a value depends on where the cuts fall. The
functions here are made of operations that round the same way in both (exp,
log1p, + - * /). Tests in ``tests/ops/test_determinism.py``.
"""

import torch
from torch import Tensor


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), accurate in relative terms for any x."""
    # (x + |x|) / 2 is max(x, 0) with the right derivative at 0.
    magnitude = x.abs()
    return (x + magnitude) / 2 + torch.log1p(torch.exp(-magnitude))


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + torch.exp(-x))


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, accurate in relative terms far below 0 as well."""
    positive = x.relu()
    return positive + (x - positive).exp()


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)."""
    return x * sigmoid(x)


def sum_rows(x: Tensor) -> Tensor:
    """Sum of a (batch, position, ...) tensor over its first two axes."""
    if x[0, 0].numel() == 1:
        # A sum to a single number is the one that torch splits among threads.
        return x.expand(*x.shape[:-1], 2).sum((0, 1))[..., :1]
    return x.sum((0, 1))
