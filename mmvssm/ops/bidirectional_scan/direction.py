"""The weights of one direction of a bidirectional scan."""

from typing import NamedTuple

from torch import Tensor


class Direction(NamedTuple):
    """What one direction has of its own.

    Attributes:
        conv_weight: Depthwise causal convolution (D, W); the last column
            weighs the position itself, the first one W - 1 positions before.
        conv_bias: (D,).
        x_proj_weight: (R + 2N, D): first the R rows of the step size's
            low-rank form, then N of B, then N of C.
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
