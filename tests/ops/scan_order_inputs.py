"""Inputs of scans along any order, and the numbers they have by definition."""

import torch

from mmvssm.ops import scan_order, selective_scan, ss2d_scan

from .scan_inputs import as_double, gradients, relative_error


def order_inputs(orders, shape, rank=2, states=1, dtype=torch.float64, seed=0):
    """Arguments of ss2d_scan for a map (batch, channels, height, width)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    count, channels = len(scan_order(orders, *shape[2:])), shape[1]
    inputs = dict(
        x=normal(*shape),
        x_proj_weight=normal(count, rank + 2 * states, channels) / channels**0.5,
        dt_projs_weight=normal(count, channels, rank) / rank**0.5,
        # Steps of about 0.3: what a padded place does to the state is seen.
        dt_projs_bias=normal(count, channels) - 1,
        A=-torch.exp(normal(count * channels, states)),
        Ds=normal(count * channels),
    )
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


def by_definition(table, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds):
    """Row by row: a sequence with zeros where it is padded, its scan, and back."""
    merged = torch.zeros_like(x.flatten(2))
    rank, states = dt_projs_weight.shape[2], A.shape[1]
    for k, row in enumerate(table):
        real = row >= 0
        sequence = x.flatten(2)[:, :, row.clamp(min=0)] * real
        dt, B, C = (x_proj_weight[k] @ sequence).split((rank, states, states), dim=1)
        own = slice(k * x.shape[1], (k + 1) * x.shape[1])
        y = selective_scan(
            *(sequence, dt_projs_weight[k] @ dt, A[own], B, C, Ds[own]),
            delta_bias=dt_projs_bias[k],
            delta_softplus=True,
            backend='reference',
        )
        merged = merged.index_add(2, row[real], y[:, :, real])
    return merged.view(x.shape)


def compare(inputs, orders, backend, tolerance):
    """Outputs and gradients, with those of the definition in float64."""
    double = as_double(inputs)
    y = ss2d_scan(**inputs, orders=orders, backend=backend)
    want = by_definition(scan_order(orders, *y.shape[2:]), **double)
    results = dict(y=y, **gradients((y,), inputs))
    truth = dict(y=want, **gradients((want,), double))
    errors = {name: relative_error(results[name], truth[name]) for name in truth}
    wrong = {name: error for name, error in errors.items() if not error < tolerance}
    assert not wrong, wrong
