"""Random inputs of bidirectional_scan, and what it computes, by its definition."""

import torch
import torch.nn.functional as F

from mmvssm.ops import Direction, bidirectional_scan, selective_scan

WAYS = ('forward', 'backward')


def direction(generator, channels, rank, states, width):
    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Direction(
        normal(channels, width) / width**0.5,
        normal(channels),
        normal(rank + 2 * states, channels) / channels**0.5,
        normal(channels, rank) / rank**0.5,
        normal(channels) - 3,
        -torch.exp(normal(channels, states)),
        normal(channels),
    )


def make_inputs(batch, channels, length, rank, states, width, dtype=torch.float64):
    """Flat leaves by name; ``call`` puts the directions together."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(batch, length, channels, generator=generator).double().mT
        for name in ('x', 'z')
    }
    for way in WAYS:
        weights = direction(generator, channels, rank, states, width)
        inputs |= {f'{way}.{k}': v for k, v in weights._asdict().items()}
    return {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}


def arguments(inputs):
    ways = [
        Direction(*(inputs[f'{way}.{name}'] for name in Direction._fields))
        for way in WAYS
    ]
    return inputs['x'], inputs['z'], *ways


def call(inputs, **kwargs):
    return bidirectional_scan(*arguments(inputs), **kwargs)


def flip_twice(inputs, average=False):
    """The published formulation: two gated scans, one on flipped copies."""

    def one(x, z, w):
        width, states = w.conv_weight.shape[1], w.A.shape[1]
        u = F.silu(
            F.conv1d(x, w.conv_weight[:, None], w.conv_bias, 1, width - 1, 1, len(w.D))
        )[..., : x.shape[2]]
        rank = w.dt_proj_weight.shape[1]
        dt, B, C = (w.x_proj_weight @ u).split((rank, states, states), dim=1)
        return selective_scan(
            u,
            w.dt_proj_weight @ dt,
            w.A,
            B,
            C,
            w.D,
            z,
            w.dt_proj_bias,
            True,
            backend='reference',
        )

    x, z, forward, backward = arguments(inputs)
    y = one(x, z, forward) + one(x.flip(2), z.flip(2), backward).flip(2)
    return y / 2 if average else y
