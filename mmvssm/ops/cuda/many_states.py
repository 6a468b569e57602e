"""The selective scan with several states by CUDA kernels, forward and backward.

A thread owns a channel and walks the sequence, see ``many_states.h``. Where batch and
channels alone would leave most of a GPU idle, the sequence is cut into splits that run
side by side. The states before every chunk of positions are kept for the backward
pass, which recomputes the rest. All sums are in a fixed order: the same inputs give the
same bits.
"""

import ctypes
from collections.abc import Iterator
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmvssm.ops.cuda import kernels
from mmvssm.ops.cuda.kernels import Kernel
from mmvssm.ops.cuda.scan import Scan
from mmvssm.ops.deterministic_math import linear_product
from mmvssm.ops.kernel_args import fields, parameter, pointer

# Positions of a chunk, and states that a kernel has at most; more are scanned by 16.
CHUNK = 16
_STATES = (4, 8, 16)
# The largest rank whose low-rank form the kernels multiply themselves.
_LARGEST_RANK = 64
# A sequence is cut into splits until there are so many warps a multiprocessor.
_WARPS = 8
# Of look-back, see many_states_splits.h.
_SPLITS_OF_GROUP = 8
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

FORWARD = Kernel('many_states_forward.cu', 'many_states_forward')


class _Rows(ctypes.Structure):
    _fields_ = fields((c_void_p, 'data'), (c_int64, 'batch channel place'))

    @classmethod
    def of(cls, x: Tensor | None) -> '_Rows':
        """Of a tensor (B, D, L), all zeros for None."""
        if x is None:
            return cls()
        return cls(x.data_ptr(), *_byte_strides(x))


class _Weights(ctypes.Structure):
    _fields_ = fields((c_void_p, 'data'), (c_int64, 'batch group state place'))

    @classmethod
    def of(cls, x: Tensor) -> '_Weights':
        """Of a tensor (B, G, N, L)."""
        return cls(x.data_ptr(), *_byte_strides(x))


class _Inputs(ctypes.Structure):
    _fields_ = fields(
        (c_int32, 'batch groups group_size length places width route states rank'),
        (c_int32, 'blocks chains splits chunks_of_split along states_along'),
        (c_void_p, 'order'),
        (_Rows, 'u z delta'),
        (_Weights, 'B C'),
        (c_void_p, 'dt_weight A D bias published'),
    )


class _ForwardArgs(ctypes.Structure):
    _fields_ = fields(
        (_Inputs, 'inputs'),
        (_Rows, 'out add total'),
        (c_void_p, 'last_state kept'),
        (c_float, 'scale'),
    )


def saved_shape(
    batch: int, length: int, states: int, channels: int
) -> tuple[int, int, int, int, int]:
    """Shape of what forward keeps: the state before each chunk but the first.

    Returns:
        (blocks of states, chunks - 1, B, D, states of a block).
    """
    size = _padded(states)
    return (-(-states // size), -(-length // CHUNK) - 1, batch, channels, size)


def forward(
    scan: Scan,
    out: Tensor,
    last_state: Tensor | None = None,
    saved: Tensor | None = None,
    add: Tensor | None = None,
    total: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """Put the kernels of the forward pass onto the stream.

    Args:
        scan: The inputs.
        out: (B, D, L), to be written.
        last_state: float32 (B, D, N), to be written unless None.
        saved: See :func:`saved_shape`, to be written unless None.
        add: float32 (B, D, L) to be added before the gate, which may be ``out``.
        total: float32 (B, D, L), to be written unless None: the sum before the gate;
            it may be ``add``.
        scale: Factor of the gate.
    """
    parts = list(_state_blocks(scan))
    for i, (part, states) in enumerate(parts):
        is_last = i + 1 == len(parts)
        to = out if is_last else torch.empty_like(out, dtype=torch.float32)
        state = None
        if last_state is not None:
            state = last_state.new_empty(*last_state.shape[:2], part.A.shape[1])
        _forward(
            part if is_last else replace(part, z=None),
            to,
            state,
            None if saved is None else saved[i],
            add,
            total if is_last else None,
            scale,
        )
        if state is not None:
            last_state[..., states] = state
        add = to


def _forward(
    scan: Scan,
    out: Tensor,
    last_state: Tensor | None,
    kept: Tensor | None,
    add: Tensor | None,
    total: Tensor | None,
    scale: float,
) -> None:
    if total is not None and add is None:
        add = torch.zeros_like(total)
    call = _Call.of(scan, (out, add, total))
    args = _ForwardArgs(
        inputs=call.inputs(),
        out=_Rows.of(out),
        add=_Rows.of(add),
        total=_Rows.of(total),
        last_state=pointer(last_state),
        kept=pointer(kept),
        scale=scale,
    )
    constants = dict(
        call.constants,
        OUT_DTYPE=_DTYPES[out.dtype],
        ADD=int(add is not None),
        TOTAL=int(total is not None),
        KEEP=int(kept is not None),
    )
    shared = _forward_shared(constants)
    FORWARD.launch(
        dict(constants, SHARED=shared),
        args,
        grid=call.chains * call.splits,
        threads=call.threads,
        shared=shared,
        on=out,
    )


def _forward_shared(constants: dict[str, int]) -> int:
    """Bytes of shared memory of a CTA, as many_states_forward.cu lays it out."""
    rows = 2 * _rows_bytes(constants, 'U_DTYPE') * (1 + constants['GATE'])
    rows += 2 * _rows_bytes(constants) * constants['ADD']
    rows += _rows_bytes(constants, 'OUT_DTYPE')
    if not constants['RANK']:
        rows += 2 * _rows_bytes(constants, 'DELTA_DTYPE')
    return rows + _staged_bytes(constants, 2)


def _rows_bytes(constants: dict[str, int], dtype: str | None = None) -> int:
    """Of the rows of a chunk, by default float32."""
    warps, size = constants['THREADS'] // 32, _size(constants, dtype)
    return warps * CHUNK * (32 if constants['VECTOR'] else 34) * size


def _staged_bytes(constants: dict[str, int], buffers: int) -> int:
    """Of B and C, what makes the steps of low rank, and the places."""
    threads, rank = constants['THREADS'], constants['RANK']
    found = buffers * CHUNK * 2 * constants['STATES'] * 4 + 4 * CHUNK * 4
    if rank:
        terms, of_weight = (1, 2) if constants['DELTA_DTYPE'] else (3, 3)
        found += buffers * terms * CHUNK * (rank + 8) * 2
        found += rank // 16 * of_weight * 4 * threads * 8
        found += CHUNK * (threads + 8) * 4
    return found


def _size(constants: dict[str, int], dtype: str | None) -> int:
    return 2 if dtype is not None and constants[dtype] else 4


# What the kernels of both passes are told


@dataclass
class _Call:
    """A scan of at most 16 states as the kernels take it.

    Attributes:
        scan: Inputs of dtypes and strides that the kernels read.
        constants: Of the inputs.
        threads: Of a CTA, one for each channel of its block.
        chains: CTAs of a split.
        splits, chunks_of_split: Of the sequence.
        published: Memory for what CTAs tell each other.
    """

    scan: Scan
    constants: dict[str, int]
    threads: int
    chains: int
    splits: int
    chunks_of_split: int
    published: Tensor | None

    @classmethod
    def of(cls, scan: Scan, others: tuple[Tensor | None, ...]) -> '_Call':
        """For inputs and other arrays (B, D, L).

        Raises:
            ValueError: There are more positions or channels than the kernels count.
        """
        scan = _as_read(scan)
        batch, channels, _ = scan.u.shape
        groups, states = scan.B.shape[1:3]
        for name, size in dict(channels=channels, length=scan.length).items():
            if size >= 2**31:
                raise ValueError(f"{name} is {size}; the backend 'cuda' counts to 2^31")
        group_size = channels // groups
        threads = _channels_of_block(group_size)
        chains = batch * groups * -(-group_size // threads)
        chunks = -(-scan.length // CHUNK)
        size = _split_size(chains * threads // 32, chunks, scan.u)
        splits = -(-chunks // size)
        published = None
        padded = _padded(states)
        if splits > 1:
            entries = splits + splits // _SPLITS_OF_GROUP
            published = scan.u.new_full(
                (entries, chains, padded // 2 + 1, threads), -1, dtype=torch.int64
            )
        low_rank = scan.dt_low_rank
        arrays = [x for x in (scan.u, scan.delta, scan.z, *others) if x is not None]
        rank = 0 if low_rank is None else -(-low_rank.shape[1] // 16) * 16
        delta = low_rank if scan.delta is None else scan.delta
        rows = [scan.B, scan.C, *([] if low_rank is None else [low_rank])]
        constants = dict(
            **dict(STATES=padded, RANK=rank, THREADS=threads, CHANNELS=threads),
            **dict(POSITIONS=CHUNK, SOFTPLUS=int(scan.softplus)),
            GATE=int(scan.z is not None),
            SPLIT=int(splits > 1),
            U_DTYPE=_DTYPES[scan.u.dtype],
            DELTA_DTYPE=_DTYPES[delta.dtype],
            B_DTYPE=_DTYPES[scan.B.dtype],
            VECTOR=int(all(_are_vectors(x, group_size) for x in arrays)),
            PAIRS=int(all(map(_are_pairs, rows))),
        )
        return cls(scan, constants, threads, chains, splits, size, published)

    def inputs(self) -> _Inputs:
        """The structure; it is of use for as long as this object is there."""
        scan = self.scan
        batch, channels, places = scan.u.shape
        groups, states = scan.B.shape[1:3]
        low_rank = scan.dt_low_rank
        delta = low_rank if scan.delta is None else scan.delta
        return _Inputs(
            **dict(batch=batch, groups=groups, group_size=channels // groups),
            **dict(length=scan.length, places=places, width=scan.width or places),
            **dict(route=scan.route, states=states),
            rank=0 if low_rank is None else low_rank.shape[1],
            blocks=self.chains // (batch * groups),
            **dict(chains=self.chains, splits=self.splits),
            chunks_of_split=self.chunks_of_split,
            along=int(scan.u.stride(2) < scan.u.stride(1)),
            states_along=int(scan.B.stride(3) < scan.B.stride(2)),
            order=pointer(scan.order),
            u=_Rows.of(scan.u),
            z=_Rows.of(scan.z),
            delta=_Rows.of(delta),
            B=_Weights.of(scan.B),
            C=_Weights.of(scan.C),
            dt_weight=pointer(scan.dt_weight),
            A=pointer(scan.A),
            D=pointer(scan.D),
            bias=pointer(scan.bias),
            published=pointer(self.published),
        )


def _as_read(scan: Scan) -> Scan:
    """In dtypes and strides that the kernels read."""
    u, z = _of_one_dtype(scan.u, scan.z)
    B, C = _of_one_dtype(scan.B, scan.C)
    delta, low_rank, weight = scan.delta, scan.dt_low_rank, parameter(scan.dt_weight)
    if low_rank is not None and low_rank.shape[1] > _LARGEST_RANK:
        assert weight is not None, 'there is one with the low-rank form'
        delta = linear_product(low_rank.mT.float(), weight).mT
        low_rank = weight = None
    (delta,), (low_rank,) = _of_one_dtype(delta), _of_one_dtype(low_rank)
    return replace(
        scan,
        **dict(u=u, z=z, B=B, C=C, delta=delta, dt_low_rank=low_rank),
        **dict(dt_weight=weight, A=parameter(scan.A), D=parameter(scan.D)),
        bias=parameter(scan.bias),
    )


def _of_one_dtype(*tensors: Tensor | None) -> list[Tensor | None]:
    """In float32, unless they are of one dtype that the kernels read."""
    dtypes = {x.dtype for x in tensors if x is not None}
    if len(dtypes) > 1 or not dtypes <= _DTYPES.keys():
        tensors = tuple(None if x is None else x.float() for x in tensors)
    return [_with_short_strides(x) for x in tensors]


def _with_short_strides(x: Tensor | None) -> Tensor | None:
    """The kernels multiply places by strides in bytes of 32 bits."""
    if x is not None and x.stride(-1) * x.element_size() >= 2**31:
        x = x.contiguous()
    return x


def _state_blocks(scan: Scan) -> Iterator[tuple[Scan, slice]]:
    """Scans of at most 16 states whose outputs add up, and which states they have."""
    size = _STATES[-1]
    states = scan.A.shape[1]
    for first in range(0, states, size):
        own = slice(first, min(first + size, states))
        yield (
            replace(
                scan,
                **dict(A=scan.A[:, own], B=scan.B[:, :, own], C=scan.C[:, :, own]),
                D=scan.D if first == 0 else None,
            ),
            own,
        )


def _padded(states: int) -> int:
    """States of the kernel that a scan of so many gets."""
    return next((size for size in _STATES if states <= size), _STATES[-1])


def _channels_of_block(group_size: int) -> int:
    """So many that the fewest threads are idle."""
    return min((128, 96, 64, 32), key=lambda size: -group_size % size)


def _split_size(warps: int, chunks: int, on: Tensor) -> int:
    """Chunks of a split, for as many warps of each."""
    wanted = _WARPS * kernels.multiprocessors(on)
    # Splits cost nearly twice as much work.
    if 2 * warps >= wanted:
        return chunks
    return max(1, chunks // -(-wanted // warps))


def _byte_strides(x: Tensor) -> list[int]:
    return [stride * x.element_size() for stride in x.stride()]


def _are_vectors(x: Tensor, group_size: int) -> bool:
    """Whether the channels of a place can be read by 16 bytes."""
    batch, channel, place = _byte_strides(x)
    found = (x.data_ptr(), batch, place, group_size * x.element_size())
    return channel == x.element_size() and not any(n % 16 for n in found)


def _are_pairs(x: Tensor) -> bool:
    """Whether two neighbours of the states or the rank can be read at once."""
    *others, inner, place = _byte_strides(x)
    found = (x.data_ptr(), *others, place)
    is_dense = inner == x.element_size() and x.shape[-2] % 2 == 0
    return is_dense and not any(n % (2 * x.element_size()) for n in found)
