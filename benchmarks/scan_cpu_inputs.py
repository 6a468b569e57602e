"""Inputs as a freshly initialised network would have them, float32."""

import torch
from torch import Tensor

from mmvssm.layers import SS2D


def op_inputs(
    batch: int,
    groups: int,
    channels: int,
    length: int,
    states: int,
    channels_last: bool,
    seed: int = 0,
    device: str = 'cpu',
) -> list[Tensor]:
    """u, delta, A, B, C, D and delta_bias of :func:`mmvssm.ops.selective_scan`.

    Step sizes spread around [1e-3, 0.1] and A_n = -n, as VMamba and Vim start.

    Args:
        channels: Of one group.
        channels_last: Whether u, delta, B and C have their positions before
            their channels or states in memory, or behind.
    """
    generator = torch.Generator(device).manual_seed(seed)
    rows = groups * channels

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, device=device)
        return x if channels_last else x.movedim(1, -1).contiguous().movedim(-1, 1)

    step = 1e-3 * 100 ** torch.rand(rows, generator=generator, device=device)
    A = -torch.arange(1.0, states + 1, device=device).expand(rows, states)
    inputs = [
        normal(batch, length, rows).mT,
        (0.5 * normal(batch, length, rows)).mT,
        A.contiguous(),
        normal(batch, length, groups, states).permute(0, 2, 3, 1),
        normal(batch, length, groups, states).permute(0, 2, 3, 1),
        torch.ones(rows, device=device),
        # The inverse of softplus.
        step + torch.log(-torch.expm1(-step)),
    ]
    return [x.requires_grad_() for x in inputs]


def ss2d_inputs(
    batch: int,
    channels: int,
    height: int,
    width: int,
    ssm_ratio: int = 1,
    seed: int = 0,
) -> list[Tensor]:
    """The arguments of :func:`mmvssm.ops.ss2d_scan` in an SS2D layer.

    Args:
        channels: Of the block; the scan has ``ssm_ratio`` times as many.
    """
    torch.manual_seed(seed)
    layer = SS2D(channels, ssm_ratio=ssm_ratio)
    x = torch.randn(batch, height, width, ssm_ratio * channels).permute(0, 3, 1, 2)
    inputs = [
        x,
        layer.x_proj_weight,
        layer.dt_projs_weight,
        layer.dt_projs_bias,
        -layer.A_logs.exp(),
        layer.Ds,
    ]
    return [tensor.detach().requires_grad_() for tensor in inputs]
