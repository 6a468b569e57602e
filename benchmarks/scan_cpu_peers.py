"""What the scan on the CPU is compared with, written anew from descriptions.

Both forms of the scan take the tensors of :func:`mmvssm.ops.selective_scan`
without a gate, with grouped B and C (B, G, N, L), and apply the softplus.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def loop_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
) -> Tensor:
    """The published ``selective_scan_ref``: a Python loop over the positions.

    Decays and inputs of all states are made at once, (B, D, L, N); the loop
    picks those of one position after the other.
    """
    groups = B.shape[1]
    delta = F.softplus(delta + delta_bias[:, None])
    decays = torch.exp(torch.einsum('bdl,dn->bdln', delta, A))
    if groups == 1:
        B, C = B[:, 0], C[:, 0]
        inputs = torch.einsum('bdl,bnl,bdl->bdln', delta, B, u)
        readout = 'bdn,bn->bd'
    else:
        B, C = (x.repeat_interleave(u.shape[1] // groups, dim=1) for x in (B, C))
        inputs = torch.einsum('bdl,bdnl,bdl->bdln', delta, B, u)
        readout = 'bdn,bdn->bd'
    h = A.new_zeros(*u.shape[:2], A.shape[1])
    ys = []
    for t in range(u.shape[2]):
        h = decays[:, :, t] * h + inputs[:, :, t]
        ys.append(torch.einsum(readout, h, C[..., t]))
    return torch.stack(ys, dim=2) + u * D[:, None]


def parallel_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
) -> Tensor:
    """A scan of logarithmically many steps in plain torch, as mamba.py has it.

    Decays, inputs and states of all positions are made, (B, L, D, N), and as
    many passes over them as there.
    """
    groups = B.shape[1]
    u, delta = u.mT, F.softplus(delta.mT + delta_bias)  # (B, L, D)
    B, C = B.permute(0, 3, 1, 2), C.permute(0, 3, 1, 2)  # (B, L, G, N)
    decays = torch.exp(delta[..., None] * A)
    weights = delta.unflatten(-1, (groups, -1, 1)) * B[:, :, :, None]
    h = _Recurrence.apply(decays, weights.flatten(2, 3) * u[..., None])
    y = h.unflatten(2, (groups, -1)) @ C[..., None]
    return (y.flatten(2) + D * u).mT


class _Recurrence(torch.autograd.Function):
    """h_t = a_t h_{t-1} + x_t along axis 1 of (B, L, D, N)."""

    @staticmethod
    def forward(ctx, a: Tensor, x: Tensor) -> Tensor:
        h = _sweep(a, x, reverse=False)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx, grad_h: Tensor) -> tuple[Tensor, Tensor]:
        a, h = ctx.saved_tensors
        # The gradient of x runs backwards through the decay of the position
        # behind it; behind the last one there is no gradient to decay.
        behind = F.pad(a[:, 1:], (0, 0, 0, 0, 0, 1))
        grad_x = _sweep(behind, grad_h, reverse=True)
        grad_a = torch.zeros_like(a)
        grad_a[:, 1:].add_(grad_x[:, 1:] * h[:, :-1])
        return grad_a, grad_x


def _sweep(a: Tensor, x: Tensor, reverse: bool) -> Tensor:
    """Solve the recurrence by Blelloch's up-sweep and down-sweep.

    Going up, neighbouring blocks are joined until one is left; the end of a
    block holds its result from a zero state and its total decay. Going down,
    the results at the ends of blocks are carried into the blocks behind them.
    """
    length = x.shape[1]
    padded = 1 << (length - 1).bit_length()
    a, x = (F.pad(t, (0, 0, 0, 0, 0, padded - length)) for t in (a, x))
    size = 1
    while size < padded:
        first, second = (size, 0) if reverse else (size - 1, -1)
        blocks_a, blocks_x = (t.unflatten(1, (-1, 2 * size)) for t in (a, x))
        blocks_x[:, :, second].add_(blocks_a[:, :, second] * blocks_x[:, :, first])
        blocks_a[:, :, second].mul_(blocks_a[:, :, first])
        size *= 2
    size //= 4
    every = slice(None)
    while size:
        blocks_a, blocks_x = (t.unflatten(1, (-1, 2 * size)) for t in (a, x))
        if reverse:
            into, before = (every, slice(-1), size), (every, slice(1, None), 0)
        else:
            into, before = (every, slice(1, None), size - 1), (every, slice(-1), -1)
        blocks_x[into].add_(blocks_a[into] * blocks_x[before])
        blocks_a[into].mul_(blocks_a[before])
        size //= 2
    return x[:, :length]


def loop_ss2d(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    scan: Callable = loop_scan,
) -> Tensor:
    """:func:`mmvssm.ops.ss2d_scan` as published for machines without a GPU.

    Four copies of the map, channels-first, their projections, the loop (or
    another scan), and the sum of its results put back in place.
    """
    batch, channels, height, width = x.shape
    rank, states = dt_projs_weight.shape[2], A.shape[1]
    xs = x.new_empty(batch, 4, channels, height * width)
    xs[:, 0] = x.flatten(2)
    xs[:, 1] = x.mT.flatten(2)
    xs[:, 2:] = xs[:, :2].flip(-1)
    projected = torch.einsum('bkcl,kmc->bkml', xs, x_proj_weight)
    dt, B, C = projected.split((rank, states, states), dim=2)
    delta = torch.einsum('bkrl,kcr->bkcl', dt, dt_projs_weight)
    ys = scan(
        *(xs.flatten(1, 2), delta.flatten(1, 2), A, B, C),
        *(Ds, dt_projs_bias.flatten()),
    ).unflatten(1, (4, channels))
    ys = ys[:, :2] + ys[:, 2:].flip(-1)
    columns = ys[:, 1].unflatten(-1, (width, height)).mT
    y = ys[:, 0].unflatten(-1, (height, width)) + columns
    return y.contiguous(memory_format=torch.channels_last)


def no_ss2d(x: Tensor, *weights: Tensor) -> Tensor:
    """In place of :func:`mmvssm.ops.ss2d_scan`: nothing."""
    return x.contiguous(memory_format=torch.channels_last)
