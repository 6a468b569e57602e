"""The selective scan with one state a channel by CUDA kernels.

A CTA has a block of channels and walks the sequence chunk by chunk, its threads side by
side in the channels and in the positions of a chunk, see ``one_state.h``. Where batch
and channels alone would leave most of a GPU idle, each chunk has a CTA of its own that
looks back at those before it; and several scans may share a launch. All sums are in a
fixed order: the same inputs give the same bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmvssm.ops.cuda import one_state_backward
from mmvssm.ops.cuda.kernels import Kernel
from mmvssm.ops.cuda.merge import merge
from mmvssm.ops.cuda.one_state_call import (
    CHUNK,
    DTYPES,
    MAX_SCANS,
    Args,
    Call,
    Strides,
    run_side_by_side,
    shared_bytes,
)
from mmvssm.ops.cuda.one_state_map import forward_on_chip
from mmvssm.ops.cuda.scan import Scan, sum_for, turns
from mmvssm.ops.kernel_args import pointer

FORWARD = Kernel('one_state_forward.cu', 'one_state_forward')


Gradients = one_state_backward.Gradients
backward = one_state_backward.backward
backward_at_once = one_state_backward.backward_at_once


def saved_shape(
    batch: int, length: int, states: int, channels: int
) -> tuple[int, int, int, int]:
    """Shape of what forward keeps: the state before each chunk but the first.

    Returns:
        (B, chunks - 1, D, N).
    """
    return (batch, -(-length // CHUNK) - 1, channels, states)


def forward(
    scan: Scan,
    out: Tensor,
    last_state: Tensor | None = None,
    saved: Tensor | None = None,
    add: Tensor | None = None,
) -> None:
    """Put the kernel of the forward pass onto the stream: see ``ScanKernels.forward``.

    Raises:
        ValueError: There are more positions or channels than the kernels count.
    """
    _forward(
        *([scan], [out]),
        saved=None if saved is None else [saved],
        last_state=last_state,
        add=add,
    )


def forward_merged(
    scans: Sequence[Scan], out: Tensor, saved: Sequence[Tensor] | None = None
) -> None:
    """Scan the same map along several orders, and add up.

    In one launch where the sum has room in shared memory, see ``one_state_map.py``.
    Else, where one scan keeps the GPU busy, they follow one another, each adding to
    the sum of those before it; or they are scanned at the same time, and then merged,
    which adds in the same order.

    Args:
        scans: The inputs, ``u`` and all strides the same.
        out: (B, D, L), to be written; (B, L, D) is contiguous.
        saved: Of each scan see :func:`saved_shape`, to be written unless None.

    Raises:
        ValueError: There are more positions or channels than the kernels count.
    """
    memory = out.mT
    assert memory.is_contiguous(), 'the sums are laid out like the output'
    if forward_on_chip(scans, out, saved):
        return
    order = turns(scans)
    scans = [scans[k] for k in order]
    saved = None if saved is None else [saved[k] for k in order]
    if not run_side_by_side(scans):
        total = sum_for(out)
        for k, scan in enumerate(scans):
            to = out if k + 1 == len(scans) else total
            states = None if saved is None else saved[k]
            forward(scan, to, saved=states, add=total if k else None)
        return
    parts = memory.new_empty((len(scans), *memory.shape), dtype=torch.float32)
    for first in range(0, len(scans), MAX_SCANS):
        some = slice(first, first + MAX_SCANS)
        kept = None if saved is None else saved[some]
        _forward(scans[some], parts[some].mT, saved=kept)
    merge(parts, memory)


def _forward(
    scans: Sequence[Scan],
    outs: Sequence[Tensor] | Tensor,
    saved: Sequence[Tensor] | None = None,
    last_state: Tensor | None = None,
    add: Tensor | None = None,
) -> None:
    call = Call.of(
        scans,
        constants=dict(OUT_DTYPE=DTYPES[outs[0].dtype], ADD=int(add is not None)),
        stored=(outs[0],) if add is None else (outs[0], add),
        shared_bytes=shared_bytes,
        args=Args,
    )
    args = call.args()
    args.out_strides, args.add_strides = Strides.of(outs[0]), Strides.of(add)
    for k, to in enumerate(outs):
        own = args.scans[k]
        own.out, own.add, own.last_state = map(pointer, (to, add, last_state))
        own.saved = None if saved is None else pointer(saved[k])
    call.launch(FORWARD, args, args)
