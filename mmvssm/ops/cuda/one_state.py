"""The selective scan with one state a channel by CUDA kernels.

A CTA has a block of channels and walks the sequence chunk by chunk, its threads side by
side in the channels and in the positions of a chunk, see ``one_state.h``. Where batch
and channels alone would leave most of a GPU idle, each chunk has a CTA of its own that
looks back at those before it; and several scans may share a launch. All sums are in a
fixed order: the same inputs give the same bits.
"""

import ctypes
from collections.abc import Iterable, Sequence
from ctypes import c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmvssm.ops.cuda import kernels
from mmvssm.ops.cuda.kernels import Kernel
from mmvssm.ops.cuda.scan import Scan
from mmvssm.ops.deterministic_math import linear_product
from mmvssm.ops.kernel_args import fields, parameter, pointer

# Positions of a chunk, of which a thread has so many of so many channels.
CHUNK = 64
_OWN, _WIDTH = 8, 4
# Scans of a launch, at most.
MAX_SCANS = 4
# The largest rank whose low-rank form the kernels multiply themselves.
_LARGEST_RANK = 64
# A GPU is kept busy by so many warps a multiprocessor.
_WARPS = 8
# Chunks from one state that CTAs publish to the next, see one_state_exchange.h.
_LOOK_BACK = 2 * CHUNK // _OWN
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

FORWARD = Kernel('one_state_forward.cu', 'one_state_forward')
MERGE = Kernel('merge.cu', 'merge')


class _Strides(ctypes.Structure):
    """Of a tensor of three axes, in bytes."""

    _fields_ = fields((c_int64, 'batch channel position'))

    @classmethod
    def of(cls, x: Tensor | None) -> '_Strides':
        """All zeros for None."""
        return cls() if x is None else cls(*_byte_strides(x))


class _ScanPointers(ctypes.Structure):
    _fields_ = fields(
        (c_void_p, 'delta B C weight A D bias out add saved last_state order'),
        (c_int32, 'start step columns unused'),
    )


class _Args(ctypes.Structure):
    _fields_ = [
        ('scans', _ScanPointers * MAX_SCANS),
        *fields(
            (c_void_p, 'u z'),
            (_Strides, 'u_strides z_strides delta_strides'),
            (_Strides, 'B_strides C_strides out_strides add_strides'),
            (c_void_p, 'published'),
            (c_int32, 'batch groups group_size blocks chains length width height'),
            (c_uint32, 'height_inverse height_shift'),
            (c_int32, 'chunks chunks_of_cta'),
        ),
    ]


class _MergeArgs(ctypes.Structure):
    _fields_ = fields((c_void_p, 'parts out'), (c_int64, 'size count'))


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
    """Put the kernel of the forward pass onto the stream.

    Args:
        scan: The inputs.
        out: (B, D, L), to be written.
        last_state: float32 (B, D, 1), to be written unless None.
        saved: See :func:`saved_shape`, to be written unless None.
        add: float32 (B, D, L) to be added before the gate, which may be ``out``.

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

    Where one scan keeps the GPU busy they follow one another, each adding to the sum
    of those before it. Else they are scanned at the same time, and then merged.

    Args:
        scans: The inputs, ``u`` and all strides the same.
        out: (B, D, L), to be written; (B, L, D) is contiguous.
        saved: Of each scan see :func:`saved_shape`, to be written unless None.

    Raises:
        ValueError: There are more positions or channels than the kernels count.
    """
    memory = out.mT
    assert memory.is_contiguous(), 'the sums are laid out like the output'
    call = _Call.of(scans[:1])
    if len(scans) == 1 or call.warps >= _wanted_warps(out):
        total = memory.new_empty(memory.shape, dtype=torch.float32).mT
        for k, scan in enumerate(scans):
            to = out if k + 1 == len(scans) else total
            states = None if saved is None else saved[k]
            forward(scan, to, saved=states, add=total if k else None)
        return
    parts = memory.new_empty((len(scans), *memory.shape), dtype=torch.float32)
    for first in range(0, len(scans), MAX_SCANS):
        some = slice(first, first + MAX_SCANS)
        states = None if saved is None else saved[some]
        _forward(scans[some], parts[some].mT, saved=states)
    _merge(parts, memory)


def _forward(
    scans: Sequence[Scan],
    outs: Sequence[Tensor],
    saved: Sequence[Tensor] | None = None,
    last_state: Tensor | None = None,
    add: Tensor | None = None,
) -> None:
    call = _Call.of(scans, outs=(outs[0],) if add is None else (outs[0], add))
    args = call.args()
    args.out_strides, args.add_strides = _Strides.of(outs[0]), _Strides.of(add)
    for k, to in enumerate(outs):
        own = args.scans[k]
        own.out, own.add, own.last_state = map(pointer, (to, add, last_state))
        own.saved = None if saved is None else pointer(saved[k])
    constants = dict(
        call.constants, OUT_DTYPE=_DTYPES[outs[0].dtype], ADD=int(add is not None)
    )
    call.launch(FORWARD, constants, args)


def _merge(parts: Tensor, out: Tensor) -> None:
    """Add up the first axis of float32 ``parts``; both are contiguous."""
    width = 4 if out.numel() % 4 == 0 else 1
    threads = 256
    args = _MergeArgs(
        parts=parts.data_ptr(),
        out=out.data_ptr(),
        size=out.numel(),
        count=len(parts),
    )
    MERGE.launch(
        dict(THREADS=threads, WIDTH=width, OUT_DTYPE=_DTYPES[out.dtype]),
        args,
        grid=-(-out.numel() // (threads * width)),
        threads=threads,
        on=out,
    )


# What the kernels of both passes are told


@dataclass
class _Call:
    """Scans of the same map as the kernels take them.

    Attributes:
        scans: Inputs of dtypes and strides that the kernels read.
        constants: Of the inputs.
        threads: Of a CTA.
        blocks: Of channels, in a group of them.
        chains: CTAs that have different channels, groups, batch elements or scans.
    """

    scans: list[Scan]
    constants: dict[str, int]
    threads: int
    blocks: int
    chains: int

    @classmethod
    def of(cls, scans: Sequence[Scan], outs: Iterable[Tensor] = ()) -> '_Call':
        """For inputs, and outputs (B, D, L).

        Raises:
            ValueError: There are more positions or channels than the kernels count.
        """
        scans = [_as_read(scan) for scan in scans]
        scan = scans[0]
        batch, channels, _ = scan.u.shape
        for name, size in dict(channels=channels, length=scan.length).items():
            if size >= 2**29:
                raise ValueError(f"{name} is {size}; the backend 'cuda' counts to 2^29")
        groups = scan.B.shape[1]
        group_size = channels // groups
        channel_block = _channel_block(group_size)
        blocks = -(-group_size // channel_block)
        delta = _delta(scan)
        rank = 0 if scan.dt_low_rank is None else delta.shape[1]
        rows = [scan.u, scan.z, None if rank else delta]
        constants = dict(
            **dict(CHANNELS=channel_block, POSITIONS=CHUNK, RANK=rank),
            THREADS=channel_block // _WIDTH * (CHUNK // _OWN),
            **dict(SOFTPLUS=int(scan.softplus), GATE=int(scan.z is not None)),
            U_DTYPE=_DTYPES[scan.u.dtype],
            DELTA_DTYPE=_DTYPES[delta.dtype],
            B_DTYPE=_DTYPES[scan.B.dtype],
            COPY=_copied_bytes([x for x in rows if x is not None], group_size),
            PAIRS=int(rank > 0 and _are_pairs(delta)),
            VECTOR=int(all(_are_vectors(x, group_size) for x in outs)),
            ARGS=ctypes.sizeof(_Args),
        )
        chains = len(scans) * batch * groups * blocks
        return cls(scans, constants, constants['THREADS'], blocks, chains)

    @property
    def warps(self) -> int:
        """Of CTAs that walk whole sequences."""
        return self.chains * self.threads // 32

    def args(self) -> _Args:
        """The structure; it is of use for as long as this object is there."""
        scan = self.scans[0]
        batch, channels, places = scan.u.shape
        groups = scan.B.shape[1]
        width = scan.width or places
        height = places // width
        shift = (height - 1).bit_length()
        chunks = -(-scan.length // CHUNK)
        args = _Args(
            **dict(u=pointer(scan.u), z=pointer(scan.z)),
            u_strides=_Strides.of(scan.u),
            z_strides=_Strides.of(scan.z),
            delta_strides=_Strides.of(_delta(scan)),
            B_strides=_Strides.of(scan.B[:, :, 0]),
            C_strides=_Strides.of(scan.C[:, :, 0]),
            **dict(batch=batch, groups=groups, group_size=channels // groups),
            **dict(blocks=self.blocks, chains=self.chains, length=scan.length),
            **dict(width=width, height=height, height_shift=shift),
            # So that 2 t height_inverse >> 32 + height_shift is t // height.
            height_inverse=-(-(2 ** (31 + shift)) // height),
            **dict(chunks=chunks, chunks_of_cta=chunks),
        )
        for k, one in enumerate(self.scans):
            args.scans[k] = _scan_pointers(one)
        return args

    def launch(
        self, kernel: Kernel, constants: dict[str, int], args: _Args
    ) -> None:
        """Launch CTAs that walk whole sequences, or else look back."""
        on = self.scans[0].u
        published = None
        grid = self.chains
        if args.chunks > 1 and self.warps < _wanted_warps(on):
            entries = args.chunks + -(-args.chunks // _LOOK_BACK)
            shape = (self.chains, entries, constants['CHANNELS'])
            published = on.new_full(shape, -1, dtype=torch.int64)
            args.published, args.chunks_of_cta = pointer(published), 1
            grid *= args.chunks
        shared = _shared_bytes(constants)
        kernel.launch(
            dict(constants, SHARED=shared),
            args,
            grid=grid,
            threads=self.threads,
            shared=shared,
            on=on,
        )


def _as_read(scan: Scan) -> Scan:
    """In dtypes and strides that the kernels read."""
    low_rank, weight = scan.dt_low_rank, parameter(scan.dt_weight)
    delta = scan.delta
    if low_rank is not None and low_rank.shape[1] > _LARGEST_RANK:
        assert weight is not None, 'there is one with the low-rank form'
        delta = linear_product(low_rank.mT.float(), weight).mT
        low_rank = weight = None
    u, z = _of_one_dtype(scan.u, scan.z)
    B, C = _of_one_dtype(scan.B, scan.C)
    (delta,), (low_rank,) = _of_one_dtype(delta), _of_one_dtype(low_rank)
    assert u is not None and B is not None and C is not None
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


def _delta(scan: Scan) -> Tensor:
    """(B, D, L), or the low-rank form (B, R, L)."""
    found = scan.delta if scan.dt_low_rank is None else scan.dt_low_rank
    assert found is not None, 'a scan has one of them'
    return found


def _scan_pointers(scan: Scan) -> _ScanPointers:
    reverse = scan.route >= 2
    return _ScanPointers(
        delta=pointer(_delta(scan)),
        **dict(B=pointer(scan.B), C=pointer(scan.C), weight=pointer(scan.dt_weight)),
        **dict(A=pointer(scan.A), D=pointer(scan.D), bias=pointer(scan.bias)),
        order=pointer(scan.order),
        start=scan.length - 1 if reverse else 0,
        step=-1 if reverse else 1,
        columns=scan.route % 2,
    )


def _channel_block(group_size: int) -> int:
    """Channels of a CTA: so many that the fewest threads are idle."""
    return min((128, 96, 64, 32), key=lambda size: -group_size % size)


def _wanted_warps(on: Tensor) -> int:
    return _WARPS * kernels.multiprocessors(on)


def _shared_bytes(constants: dict[str, int]) -> int:
    """Bytes of shared memory of a CTA, see ``Layout`` in one_state_inputs.h."""
    channels, rank = constants['CHANNELS'], constants['RANK']
    padded = channels + (0 if constants['COPY'] else _WIDTH)

    def rows(dtype: str) -> int:
        return 2 * CHUNK * padded * (2 if constants[dtype] else 4)

    found = rows('U_DTYPE') * (1 + constants['GATE'])
    found += 2 * CHUNK * (4 + 8) + 2 * channels * 4  # places, B, C, carry
    found += CHUNK // _OWN * 2 * channels * 4  # steps of the teams
    if rank:
        terms, of_weight = (1, 2) if constants['DELTA_DTYPE'] else (3, 3)
        tiles = -(-rank // 16)
        found += terms * CHUNK * (16 * tiles + 8) * 2
        found += of_weight * tiles * channels // 8 * 32 * 8 + channels * 4
    else:
        found += rows('DELTA_DTYPE')
    if rank or constants['ADD']:
        found += CHUNK * (channels + 8) * 4
    return found


def _byte_strides(x: Tensor) -> list[int]:
    """Of a tensor (batch, channel, position); 0 where there is only one."""
    size = x.element_size()
    return [
        0 if count == 1 else stride * size for count, stride in zip(x.shape, x.stride())
    ]


def _copied_bytes(rows: Sequence[Tensor], group_size: int) -> int:
    """Bytes that can be copied at once from each of them, 0: not even four."""
    for size in (16, 8, 4):
        if all(_are_aligned(x, group_size, size) for x in rows):
            return size
    return 0


def _are_vectors(x: Tensor, group_size: int) -> bool:
    """Whether the channels of a thread can be stored at once, float32 states too."""
    width = _WIDTH * x.element_size()
    return group_size % _WIDTH == 0 and _are_aligned(x, group_size, width)


def _are_aligned(x: Tensor, group_size: int, size: int) -> bool:
    """Whether the channels of a group lie side by side, in pieces of ``size`` bytes."""
    batch, channel, position = _byte_strides(x)
    found = (x.data_ptr(), batch, position, group_size * x.element_size())
    is_dense = channel in (0, x.element_size())
    return is_dense and not any(n % size for n in found)


def _are_pairs(x: Tensor) -> bool:
    """Whether two neighbours of the low-rank form can be read at once."""
    batch, rank, position = _byte_strides(x)
    is_dense = rank == x.element_size() and x.shape[1] % 2 == 0
    found = (x.data_ptr(), batch, position)
    return is_dense and not any(n % (2 * x.element_size()) for n in found)
