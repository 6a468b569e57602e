"""The selective scan with several states by CUDA kernels, forward and backward.

A thread owns a channel and walks the sequence, see ``many_states.h``. Where batch and
channels alone would leave most of a GPU idle, the sequence is cut into splits that run
side by side. The states before some of the positions are kept for the backward pass,
which recomputes the rest. All sums are in a fixed order: the same inputs give the same
bits.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mmvssm.ops.cuda import many_states_call
from mmvssm.ops.cuda.many_states_call import (
    BACKWARD,
    DTYPES,
    FORWARD,
    STATES,
    BackwardArgs,
    Call,
    ForwardArgs,
    Rows,
    padded,
    readable,
)
from mmvssm.ops.cuda.scan import Scan
from mmvssm.ops.kernel_args import parameter, pointer

# Of A, B, C, D and bias.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def saved_shape(
    batch: int, length: int, states: int, channels: int
) -> tuple[int, int, int, int, int]:
    """Shape of what forward keeps: the states before some positions, evenly spaced.

    Returns:
        (blocks of states, positions, B, D, states of a block).
    """
    size, spacing = padded(states), many_states_call.KEPT
    return (-(-states // size), -(-length // spacing) - 1, batch, channels, size)


def forward(
    scan: Scan,
    out: Tensor,
    last_state: Tensor | None = None,
    saved: Tensor | None = None,
    add: Tensor | None = None,
    scale: float = 1.0,
    put_total: bool = False,
) -> None:
    """Put the kernels of the forward pass onto the stream.

    Args:
        scan: The inputs.
        out: (B, D, L), to be written.
        last_state: float32 (B, D, N), to be written unless None.
        saved: See :func:`saved_shape`, to be written unless None.
        add: float32 (B, D, L) to be added before the gate, which may be ``out``.
        scale: Factor of the gate.
        put_total: Put the sum before the gate into ``add``.
    """
    parts = list(_state_blocks(scan))
    # Of several, each adds to what the ones before have made.
    sums = add
    if len(parts) > 1 and not put_total:
        sums = torch.empty_like(out, dtype=torch.float32)
    for i, (part, states) in enumerate(parts):
        is_last = i + 1 == len(parts)
        state = None
        if last_state is not None:
            state = last_state.new_empty(*last_state.shape[:2], part.A.shape[1])
        _forward(
            part if is_last else replace(part, z=None),
            out if is_last or sums is None else sums,
            state,
            None if saved is None else saved[i],
            sums if i else add,
            scale,
            put_total and is_last,
        )
        if last_state is not None and state is not None:
            last_state[..., states] = state


def _forward(
    scan: Scan,
    out: Tensor,
    last_state: Tensor | None,
    kept: Tensor | None,
    add: Tensor | None,
    scale: float,
    put_total: bool,
) -> None:
    call = Call.of(
        *(scan, FORWARD, (out, add)),
        OUT_DTYPE=DTYPES[out.dtype],
        ADD=int(add is not None),
        TOTAL=int(put_total),
        KEEP=int(kept is not None),
    )
    args = ForwardArgs(
        inputs=call.inputs(),
        out=Rows.of(out),
        add=Rows.of(add),
        last_state=pointer(last_state),
        kept=pointer(kept),
        inverse=1 / scale,
    )
    call.launch(args)


def backward(
    scan: Scan,
    saved: Tensor,
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    rows: tuple[Tensor, Tensor, Tensor | None],
    add: bool = False,
    total: Tensor | None = None,
    scale: float = 1.0,
) -> Gradients:
    """Put the kernels of the backward pass onto the stream.

    Args:
        scan: The inputs.
        saved: What the forward pass kept.
        grad_out: (B, D, L).
        grad_last_state: (B, D, N), None for zero.
        rows: Gradients of u, delta and z (B, D, L), to be written; that of z only
            unless None.
        add: Add to what is in the gradient of u.
        total: float32 (B, D, L), the sum before the gate; None if it is the output of
            this scan.
        scale: Factor of the gate.

    Returns:
        Gradients of A (D, N), B and C (B, G, L, N), D and bias (D,).
    """
    grad_out = readable(grad_out)
    parts = list(_state_blocks(scan))
    if len(parts) == 1:
        return _backward(
            scan, saved[0], grad_out, grad_last_state, rows, add, total, scale
        )
    grad_u, grad_delta, grad_z = rows
    if scan.z is not None:
        if grad_z is not None and total is None:
            total = torch.empty_like(grad_out, dtype=torch.float32)
            forward(replace(scan, z=None), total)
        grad_out = _gate_backward(scan.z, grad_out, total, grad_z, scale)
    sums_u, sums_delta = (torch.empty_like(x, dtype=torch.float32) for x in rows[:2])
    if add:
        sums_u.copy_(grad_u)
    found = []
    for i, (part, states) in enumerate(parts):
        by_delta = torch.empty_like(sums_delta) if i else sums_delta
        by_state = None if grad_last_state is None else grad_last_state[..., states]
        found.append(
            _backward(
                *(replace(part, z=None), saved[i], grad_out, by_state),
                rows=(sums_u, by_delta, None),
                add=add or i > 0,
            )
        )
        if i:
            sums_delta += by_delta
    grad_u.copy_(sums_u)
    grad_delta.copy_(sums_delta)
    by_A, by_B, by_C, by_D, by_bias = zip(*found)
    return (
        torch.cat(by_A, dim=-1),
        torch.cat(by_B, dim=-1),
        torch.cat(by_C, dim=-1),
        by_D[0],
        None if scan.bias is None else torch.stack(by_bias).sum(0),
    )


def _gate_backward(
    z: Tensor,
    grad_out: Tensor,
    total: Tensor | None,
    grad_z: Tensor | None,
    scale: float,
) -> Tensor:
    """Gradient of the sum before the gate; that of the gate is written."""
    z, grad_out = z.float(), grad_out.float() * scale
    opened = torch.sigmoid(z)
    if grad_z is not None and total is not None:
        grad_z.copy_(grad_out * total * (opened * (1 + z * (1 - opened))))
    return grad_out * z * opened


def _backward(
    scan: Scan,
    kept: Tensor,
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    rows: tuple[Tensor, Tensor, Tensor | None],
    add: bool,
    total: Tensor | None = None,
    scale: float = 1.0,
) -> Gradients:
    grad_u, grad_delta, grad_z = rows
    gate = int(scan.z is not None)
    if grad_z is not None:
        gate = 3 if total is None else 2
    call = Call.of(
        *(scan, BACKWARD, (grad_out, *rows, total)),
        GATE=gate,
        ADD=int(add),
        GRAD_OUT_DTYPE=DTYPES[grad_out.dtype],
        GRAD_U_DTYPE=DTYPES[grad_u.dtype],
        GRAD_DELTA_DTYPE=DTYPES[grad_delta.dtype],
    )
    batch, channels, places = scan.u.shape
    groups, states = scan.B.shape[1:3]
    size = call.constants['STATES']

    def new(*shape: int) -> Tensor:
        return grad_out.new_empty(shape, dtype=torch.float32)

    by_A = new(call.splits, batch, channels, size)
    by_D, by_bias = (
        None if x is None else new(call.splits, batch, channels)
        for x in (scan.D, scan.bias)
    )
    by_B, by_C = (new(call.blocks, batch, groups, places, size) for _ in 'BC')
    grad_last_state = parameter(grad_last_state)
    args = BackwardArgs(
        inputs=call.inputs(),
        grad_out=Rows.of(grad_out),
        total=Rows.of(total),
        grad_u=Rows.of(grad_u),
        grad_delta=Rows.of(grad_delta),
        grad_z=Rows.of(grad_z),
        kept=pointer(kept),
        grad_last_state=pointer(grad_last_state),
        **dict(grad_A=pointer(by_A), grad_D=pointer(by_D), grad_bias=pointer(by_bias)),
        **dict(grad_B=pointer(by_B), grad_C=pointer(by_C)),
        inverse=1 / scale,
    )
    call.launch(args)
    return (
        by_A.sum((0, 1))[:, :states],
        by_B.sum(0)[..., :states],
        by_C.sum(0)[..., :states],
        None if by_D is None else by_D.sum((0, 1)),
        None if by_bias is None else by_bias.sum((0, 1)),
    )


def _state_blocks(scan: Scan) -> Iterator[tuple[Scan, slice]]:
    """Scans of at most 16 states whose outputs add up, and which states they have."""
    states, size = scan.A.shape[1], STATES[-1]
    for first in range(0, states, size):
        own = slice(first, min(first + size, states))
        part = replace(
            scan,
            A=scan.A[:, own],
            B=scan.B[:, :, own],
            C=scan.C[:, :, own],
            D=scan.D if first == 0 else None,
        )
        yield part, own
