"""Inputs of linear attention for the tests of its kernels."""

import torch


def make_inputs(
    batch, length, heads, keys, values=None, *, dtype=torch.float32, seed=0
):
    generator = torch.Generator().manual_seed(seed)
    channels = dict(
        q=heads * keys, k=heads * keys, v=heads * (keys if values is None else values)
    )
    return {
        name: torch.randn(batch, length, count, generator=generator)
        .to(dtype)
        .requires_grad_()
        for name, count in channels.items()
    }


def make_tables(inputs):
    """Cosines and sines of angles of every size."""
    _, length, channels = inputs['q'].shape
    generator = torch.Generator().manual_seed(1)
    angles = 40 * torch.rand(length, channels // 2, generator=generator)
    return angles.cos(), angles.sin()
