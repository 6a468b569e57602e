"""A linear layer."""

import torch
from torch import nn

from mmvssm.ops import linear


class Linear(nn.Linear):
    """``nn.Linear``, computed by :func:`mmvssm.ops.linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)
