"""Residual addition, followed by an RMS norm."""

import torch
from torch import nn

from mmvssm.ops import add_rms_norm


class AddRMSNorm(nn.Module):
    """Add a branch to the residual stream, return the sum and its RMS norm.

    Args:
        channels: Size of the last axis.
        eps: Added to the mean square.
        residual_in_fp32: Keep the residual stream in float32; see
            :func:`mmvssm.ops.add_rms_norm`.
    """

    def __init__(
        self, channels: int, eps: float = 1e-5, residual_in_fp32: bool = False
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm(
            x,
            self.weight,
            residual,
            self.eps,
            residual_in_fp32=self.residual_in_fp32,
        )

    def extra_repr(self) -> str:
        return f'{len(self.weight)}, eps={self.eps}'
