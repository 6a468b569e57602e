"""Stochastic depth."""

import torch
from torch import nn


class DropPath(nn.Module):
    """Drop a residual branch for whole samples (Huang et al., 2016).

    While training, each sample of the batch is zeroed with probability ``drop_prob``,
    and the others are divided by ``1 - drop_prob``. So the expected value does not
    change. In eval mode this is the identity.

    Args:
        drop_prob: Probability of dropping a sample, in [0, 1).
    """

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f'drop_prob must be in [0, 1), got {drop_prob}')
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1))
        return x * mask.bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob:.3f}'
