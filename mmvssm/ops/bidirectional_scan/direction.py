"""The weights of one direction of a bidirectional scan."""

from typing import NamedTuple

from torch import Tensor


class Direction(NamedTuple):
    """The weights of one direction.

    Attributes:
        conv_weight: Depthwise causal convolution (D, W). The last column is the weight
            of the position itself, the first one that of W - 1 positions before.
        conv_bias: (D,).
        x_proj_weight: (R + 2N, D): first the R rows of the low-rank step sizes, then N
            rows of B, then N rows of C.
        dt_proj_weight: (D, R).
        dt_proj_bias: (D,), added before the softplus.
        A: Decay rates (D, N), negative.
        D: Skip weights (D,).
    """

    conv_weight: Tensor
    conv_bias: Tensor
    x_proj_weight: Tensor
    dt_proj_weight: Tensor
    dt_proj_bias: Tensor
    A: Tensor
    D: Tensor
