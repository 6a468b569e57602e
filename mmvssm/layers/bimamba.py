"""The block of Vim and Mamba®: a bidirectional selective scan on a sequence.

Names of parameters are those of the published code, in which ``_b`` marks the
backward direction.
"""

import math

import torch
from torch import nn

from mmvssm.layers.drop_path import DropPath
from mmvssm.layers.linear import Linear
from mmvssm.layers.norm import AddRMSNorm
from mmvssm.ops import Direction, bidirectional_scan
from mmvssm.registry import MODELS


@MODELS.register_module()
class BidirectionalMamba(nn.Module):
    """Mixer of a block (Algorithm 1 of arXiv 2401.09417).

    ``x, z = in_proj(x)``, then a scan from each end with separate weights, then the
    gate ``SiLU(z)`` and ``out_proj``.

    Args:
        channels: C of input and output.
        d_state: States N of each channel.
        d_conv: Width of the causal convolution.
        expand: Channels inside, relative to C.
        average: Average the two directions; otherwise add them up.

    Note:
        ``A_log``, ``D`` and the bias of the step sizes enter the scan in
        float32 (or float64), for a sequence of any dtype.
    """

    def __init__(
        self,
        channels: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        average: bool = True,
    ):
        super().__init__()
        inner = expand * channels
        dt_rank = math.ceil(channels / 16)
        self.average = average
        states = torch.arange(1.0, d_state + 1).log().repeat(inner, 1)
        for suffix, decay in (('', 'A_log'), ('_b', 'A_b_log')):
            self.register_parameter(decay, nn.Parameter(states.clone()))
            self.register_parameter(f'D{suffix}', nn.Parameter(torch.ones(inner)))
        self.in_proj = Linear(channels, 2 * inner, bias=False)
        for suffix in ('', '_b'):
            conv = nn.Conv1d(inner, inner, d_conv, groups=inner)
            x_proj = nn.Linear(inner, dt_rank + 2 * d_state, bias=False)
            dt_proj = nn.Linear(dt_rank, inner)
            init_step_size(dt_proj)
            self.add_module(f'conv1d{suffix}', conv)
            self.add_module(f'x_proj{suffix}', x_proj)
            self.add_module(f'dt_proj{suffix}', dt_proj)
        self.out_proj = Linear(inner, channels, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Sequence (B, L, C) -> sequence (B, L, C)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        y = bidirectional_scan(
            x.mT,
            z.mT,
            self._direction(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D),
            self._direction(
                self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b
            ),
            average=self.average,
        )
        return self.out_proj(y.mT)

    @staticmethod
    def _direction(
        conv: nn.Conv1d,
        x_proj: nn.Linear,
        dt_proj: nn.Linear,
        A_log: torch.Tensor,
        D: torch.Tensor,
    ) -> Direction:
        return Direction(
            conv.weight.squeeze(1),
            conv.bias,
            x_proj.weight,
            dt_proj.weight,
            _full(dt_proj.bias),
            -_full(A_log).exp(),
            _full(D),
        )


def _full(x: torch.Tensor) -> torch.Tensor:
    """Convert to float32, or keep float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def init_step_size(
    dt_proj: nn.Linear,
    dt_min: float = 1e-3,
    dt_max: float = 0.1,
    dt_floor: float = 1e-4,
) -> None:
    """Draw step sizes log-uniformly from [dt_min, dt_max]."""
    bound = dt_proj.in_features**-0.5
    dt_proj.weight.uniform_(-bound, bound)
    step = (
        torch.empty_like(dt_proj.bias)
        .uniform_(math.log(dt_min), math.log(dt_max))
        .exp_()
        .clamp_(min=dt_floor)
    )
    # The inverse of softplus, which the scan applies to the bias.
    dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))


@MODELS.register_module()
class MambaBlock(nn.Module):
    """Addition, norm, mixer: a block in the order of the published fused code.

    It takes the output of the previous mixer, and the residual stream without that
    output. It adds the two up, and returns the output of its own mixer and the stream.

    Args:
        channels: C of the sequence.
        drop_path: Probability that the incoming output of a sample is dropped. The
            first block has nothing to drop.
        residual_in_fp32: Keep the residual stream in float32.
        **mixer: Arguments of :class:`BidirectionalMamba`.
    """

    def __init__(
        self,
        channels: int,
        drop_path: float = 0.0,
        residual_in_fp32: bool = True,
        **mixer,
    ):
        super().__init__()
        self.drop_path = DropPath(drop_path)
        self.norm = AddRMSNorm(channels, residual_in_fp32=residual_in_fp32)
        self.mixer = BidirectionalMamba(channels, **mixer)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is not None:
            x = self.drop_path(x)
        x, residual = self.norm(x, residual)
        return self.mixer(x), residual
