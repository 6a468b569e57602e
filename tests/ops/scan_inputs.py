"""Random inputs of the scan ops, shared by the op tests."""

import torch

from compare import relative_error  # noqa: F401  for the tests of the ops

OPTIONAL = ('D', 'z', 'delta_bias')


def scan_inputs(
    batch,
    channels,
    length,
    states,
    groups=None,
    *,
    optional=OPTIONAL,
    dtype=torch.float64,
    channels_last=False,
    requires_grad=True,
    seed=0,
):
    """Arguments of selective_scan; ``groups=None`` gives ungrouped B and C."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = (batch, states, length)
    if groups is not None:
        weights = (batch, groups, states, length)
    inputs = dict(
        u=normal(batch, channels, length),
        delta=normal(batch, channels, length),
        A=-torch.exp(normal(channels, states)),
        B=normal(*weights),
        C=normal(*weights),
    )
    if 'D' in optional:
        inputs['D'] = normal(channels)
    if 'z' in optional:
        inputs['z'] = normal(batch, channels, length)
    if 'delta_bias' in optional:
        inputs['delta_bias'] = normal(channels)
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    if channels_last:
        for name in ('u', 'delta', 'z'):
            if name in inputs:
                inputs[name] = inputs[name].mT.contiguous().mT
        for name in ('B', 'C'):
            inputs[name] = inputs[name].movedim(-1, 1).contiguous().movedim(1, -1)
    return {name: x.requires_grad_(requires_grad) for name, x in inputs.items()}


def ss2d_inputs(
    batch,
    channels,
    height,
    width,
    rank,
    states,
    *,
    dtype=torch.float64,
    channels_last=False,
    seed=0,
):
    """Arguments of ss2d_scan, scaled as a trained layer would have them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(batch, channels, height, width)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    inputs = dict(
        x=x,
        x_proj_weight=normal(4, rank + 2 * states, channels) / channels**0.5,
        dt_projs_weight=normal(4, channels, rank) / rank**0.5,
        dt_projs_bias=normal(4, channels) - 3,
        A=-torch.exp(normal(4 * channels, states)),
        Ds=normal(4 * channels),
    )
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


def as_double(inputs):
    """The same values in float64, as leaves of their own."""
    return {name: x.detach().double().requires_grad_() for name, x in inputs.items()}


def gradients(outputs, inputs, seed=1):
    """Gradients of a fixed random projection of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    weights = [
        torch.randn(out.shape, generator=generator, dtype=torch.float64)
        for out in outputs
    ]
    found = torch.autograd.grad(
        list(outputs),
        list(inputs.values()),
        [w.to(out.device, out.dtype) for w, out in zip(weights, outputs)],
    )
    return dict(zip(inputs, found))
