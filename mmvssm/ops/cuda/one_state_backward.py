"""Gradients of the selective scan with one state a channel, by a CUDA kernel.

The states before the chunks come from the forward pass; the rest is recomputed. Each
CTA has a block of channels and goes from the last chunk to the first; where these are
few, each chunk has a CTA of its own that looks back at those of the later chunks. What
belongs to channels, and to positions of all channels, is made of parts that are added
in a fixed order: the same inputs give the same bits. See ``one_state_backward.cu``.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from mmvssm.ops.cuda.kernels import Constants, Kernel
from mmvssm.ops.cuda.merge import merge
from mmvssm.ops.cuda.one_state_call import (
    CHUNK,
    DTYPES,
    MAX_SCANS,
    WIDTH,
    Args,
    Call,
    Strides,
    with_short_strides,
)
from mmvssm.ops.cuda.scan import Scan
from mmvssm.ops.kernel_args import fields, parameter, pointer

BACKWARD = Kernel('one_state_backward.cu', 'one_state_backward')
# Channels of a CTA, the best first: the more, the fewer times what belongs to positions
# is read.
_CHANNEL_BLOCKS = (128, 64, 32)

# Of A (D, 1), B and C (B, G, L, 1), D and bias (D,).
Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
# Of u, delta and z (B, D, L).
Rows = tuple[Tensor, Tensor, Tensor | None]


class _Pointers(ctypes.Structure):
    _fields_ = fields((c_void_p, 'delta z weights A D bias last_state'))


class _BackwardArgs(ctypes.Structure):
    _fields_ = [
        ('inputs', Args),
        ('gradients', _Pointers * MAX_SCANS),
        *fields(
            (c_void_p, 'grad_out'),
            (Strides, 'grad_out_strides grad_delta_strides grad_z_strides'),
            (c_int64, 'places'),
        ),
    ]


def backward(
    scan: Scan,
    saved: Tensor,
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    rows: Rows,
    add: bool = False,
) -> Gradients:
    """Put the kernel of the backward pass onto the stream.

    Args:
        scan: The inputs.
        saved: What the forward pass kept, see ``one_state.saved_shape``.
        grad_out: (B, D, L).
        grad_last_state: (B, D, 1), None for zero.
        rows: Gradients to be written: of u, of delta and of z (B, D, L); with a
            low-rank form that of delta is before the softplus. Of any dtypes that
            the kernels read.
        add: Add to what is in the gradient of u, which is float32 then.

    Returns:
        Gradients of A (D, 1), B and C (B, G, L, 1), D and bias (D,).

    Raises:
        ValueError: There are more positions or channels than the kernels count.
    """
    return _backward([scan], [saved], grad_out, [rows], add, grad_last_state)[0]


def backward_at_once(
    scans: Sequence[Scan],
    saved: Sequence[Tensor],
    grad_out: Tensor,
    by_u: Tensor,
    by_delta: Sequence[Tensor],
) -> list[Gradients]:
    """The same for scans of one map along several orders, of which outputs are added.

    They run side by side, and then their gradients of the map are merged.

    Args:
        scans: The inputs, ``u`` and all strides the same.
        saved: Of each scan what the forward pass kept.
        grad_out: (B, D, L).
        by_u: To be written: the gradient of u, float32 (B, D, L), of which (B, L, D)
            is contiguous.
        by_delta: The same for each scan, see :func:`backward`.

    Returns:
        What :func:`backward` does, of each scan.

    Raises:
        ValueError: There are more positions or channels than the kernels count.
    """
    memory = by_u.mT
    assert memory.is_contiguous(), 'the sums are laid out like the gradient'
    found: list[Gradients] = []
    parts = memory.new_empty((len(scans), *memory.shape), dtype=torch.float32)
    for first in range(0, len(scans), MAX_SCANS):
        some = slice(first, first + MAX_SCANS)
        every = [(to.mT, x, None) for to, x in zip(parts[some], by_delta[some])]
        found += _backward(scans[some], saved[some], grad_out, every)
    merge(parts, memory)
    return found


def _backward(
    scans: Sequence[Scan],
    saved: Sequence[Tensor],
    grad_out: Tensor,
    rows: Sequence[Rows],
    add: bool = False,
    grad_last_state: Tensor | None = None,
) -> list[Gradients]:
    grad_out = _readable(grad_out)
    grad_last_state = parameter(grad_last_state)
    call = _call(scans, grad_out, rows[0], add)
    by_u, by_delta, by_z = rows[0]
    args = _BackwardArgs(
        inputs=call.args(),
        grad_out=pointer(grad_out),
        grad_out_strides=Strides.of(grad_out),
        grad_delta_strides=Strides.of(by_delta),
        grad_z_strides=Strides.of(by_z),
        places=grad_out.shape[2],
    )
    args.inputs.out_strides = Strides.of(by_u)
    sums = [_Sums(call, scan) for scan in call.scans]
    for k, (by_u, by_delta, by_z) in enumerate(rows):
        own, gradients = args.inputs.scans[k], args.gradients[k]
        own.out, own.saved = pointer(by_u), pointer(saved[k])
        gradients.delta, gradients.z = pointer(by_delta), pointer(by_z)
        gradients.last_state = pointer(grad_last_state)
        sums[k].tell(gradients)
    call.launch(BACKWARD, args, args.inputs)
    return [one.added_up() for one in sums]


def _call(scans: Sequence[Scan], grad_out: Tensor, rows: Rows, add: bool) -> Call:
    """How the kernel is launched; ``rows`` are of the first scan."""
    by_u, by_delta, by_z = rows
    maps = [x for x in rows if x is not None]
    call = Call.of(
        scans,
        constants=dict(
            GRAD_DTYPE=DTYPES[grad_out.dtype],
            OUT_DTYPE=DTYPES[by_u.dtype],
            GRAD_DELTA_DTYPE=DTYPES[by_delta.dtype],
            GRAD_Z_DTYPE=0 if by_z is None else DTYPES[by_z.dtype],
            ADD=int(add),
            SKIP=int(any(scan.D is not None for scan in scans)),
            BACKWARD_ARGS=ctypes.sizeof(_BackwardArgs),
        ),
        stored=maps,
        copied=[grad_out],
        shared_bytes=shared_bytes,
        args=Args,
        channel_blocks=_CHANNEL_BLOCKS,
    )
    scan = call.scans[0]
    delta = None if call.constants['RANK'] else scan.delta
    maps += [x for x in (scan.u, grad_out, scan.z, delta) if x is not None]
    call.constants['UNIFORM'] = int(_have_one_stride(maps))
    return call


class _Sums:
    """Gradients of what has no channels, or no positions, in parts."""

    def __init__(self, call: Call, scan: Scan) -> None:
        batch, channels, places = scan.u.shape
        new = scan.u.new_empty
        groups = scan.B.shape[1]
        parts = call.chunks if call.looks_back else 1
        self.weights = new((call.blocks, batch, groups, places, 2), dtype=torch.float32)
        self.A = new((parts, batch, channels), dtype=torch.float32)
        self.D, self.bias = (
            None if x is None else torch.empty_like(self.A) for x in (scan.D, scan.bias)
        )

    def tell(self, pointers: _Pointers) -> None:
        """Where the kernel is to write them."""
        for name in ('weights', 'A', 'D', 'bias'):
            setattr(pointers, name, pointer(getattr(self, name)))

    def added_up(self) -> Gradients:
        """Of A (D, 1), B and C (B, G, L, 1), D and bias (D,)."""
        B, C = self.weights.sum(0).unsqueeze(-2).unbind(-1)
        A, D, bias = (
            None if x is None else x.sum((0, 1)) for x in (self.A, self.D, self.bias)
        )
        assert A is not None
        return A.unsqueeze(1), B, C, D, bias


def _readable(x: Tensor) -> Tensor:
    """In a dtype and with strides that the kernel reads."""
    found = with_short_strides(x if x.dtype in DTYPES else x.float())
    assert found is not None
    return found


def _have_one_stride(maps: Sequence[Tensor]) -> bool:
    """Whether an element's number says where it is in all of them, in 30 bits."""
    strides = {x.stride(2) for x in maps}
    return len(strides) == 1 and strides.pop() * maps[0].shape[2] < 2**30


def shared_bytes(constants: Constants) -> int:
    """Bytes of shared memory of a CTA, see ``WarpLayout`` in one_state_warps.h."""
    channels, rank = constants['CHANNELS'], constants['RANK']

    def rows(dtype: str) -> int:
        return CHUNK * channels * (2 if constants[dtype] else 4)

    found = rows('U_DTYPE') * (1 + constants['GATE']) + rows('GRAD_DTYPE')
    found += CHUNK * channels * 4  # dt
    terms, of_weight = (1, 2) if constants['DELTA_DTYPE'] else (3, 3)
    if rank:
        tiles = -(-rank // 16)
        found += terms * CHUNK * (16 * tiles + 8) * 2
        found += of_weight * tiles * channels // 8 * 32 * 8
    else:
        found += rows('DELTA_DTYPE')
    found += channels // WIDTH * 176 + 64 + 32  # of channels, of all, no indices
    found += CHUNK * (8 + 2 * 4 + 4 * 4)  # B and C, indices, places
    threads = constants['THREADS']
    of_sums = 3 * threads * WIDTH * 4
    return found + (of_sums if found + of_sums <= 228 * 2 * threads - 1024 else 0)
