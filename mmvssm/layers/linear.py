"""A linear layer without bias."""

import torch
from torch import nn

from mmvssm.ops import linear


class Linear(nn.Linear):
    """``nn.Linear`` without bias, by :func:`mmvssm.ops.linear`.

    Args:
        in_features: Size of the last axis of the input.
        out_features: Of the output.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight)
