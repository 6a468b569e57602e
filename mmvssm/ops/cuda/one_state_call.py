"""What the CUDA kernels of the selective scan with one state a channel are told.

Which constants they are compiled for, which blocks of channels a CTA has, and how many
CTAs there are.
"""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from ctypes import c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmvssm.ops.cuda import kernels
from mmvssm.ops.cuda.kernels import Constants, Kernel
from mmvssm.ops.cuda.scan import Scan
from mmvssm.ops.deterministic_math import linear_product
from mmvssm.ops.kernel_args import fields, parameter, pointer

# Positions of a chunk, of which a thread has so many of so many channels.
CHUNK = 64
OWN, WIDTH = 8, 4
# Channels of a CTA.
CHANNEL_BLOCKS = (64, 32)
# Scans of a launch, at most.
MAX_SCANS = 4
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# The largest rank whose low-rank form the kernels multiply themselves.
LARGEST_RANK = 64
# A GPU is kept busy by so many warps a multiprocessor.
_WARPS = 8
# Chunks from one state that CTAs publish to the next, see one_state_exchange.h.
_LOOK_BACK = 2 * CHUNK // OWN
# Bytes of shared memory that every GPU has for a CTA.
_SHARED = 99 * 1024


class Strides(ctypes.Structure):
    """Of a tensor of three axes, in bytes."""

    _fields_ = fields((c_int64, 'batch channel position'))

    @classmethod
    def of(cls, x: Tensor | None) -> 'Strides':
        """All zeros for None."""
        return cls() if x is None else cls(*byte_strides(x))


class ScanPointers(ctypes.Structure):
    """See ``one_state.h``."""

    _fields_ = fields(
        (c_void_p, 'delta B C weight A D bias out add saved last_state order'),
        (c_int32, 'start step columns unused'),
    )


class Args(ctypes.Structure):
    """See ``one_state.h``."""

    _fields_ = [
        ('scans', ScanPointers * MAX_SCANS),
        *fields(
            (c_void_p, 'u z'),
            (Strides, 'u_strides z_strides delta_strides'),
            (Strides, 'B_strides C_strides out_strides add_strides'),
            (c_void_p, 'published'),
            (c_int32, 'batch groups group_size blocks chains length width height'),
            (c_uint32, 'height_inverse height_shift'),
            (c_int32, 'chunks chunks_of_cta'),
        ),
    ]


@dataclass
class Call:
    """Scans of the same map as the kernels take them.

    Attributes:
        scans: Inputs of dtypes and strides that the kernels read.
        constants: What the kernel is compiled for.
        blocks: Of channels, in a group of them.
        chains: CTAs that have different channels, groups, batch elements or scans.
    """

    scans: list[Scan]
    constants: dict[str, int]
    blocks: int
    chains: int

    @classmethod
    def of(
        cls,
        scans: Sequence[Scan],
        *,
        constants: Constants,
        stored: Iterable[Tensor],
        shared_bytes: Callable[[Constants], int],
        args: type[ctypes.Structure],
        copied: Iterable[Tensor] = (),
        channel_blocks: Sequence[int] = CHANNEL_BLOCKS,
    ) -> 'Call':
        """For inputs, and what else a kernel has.

        Args:
            scans: The inputs, ``u`` and all strides the same.
            constants: Those of this kernel.
            stored: Arrays (B, D, L) that it reads or writes directly.
            shared_bytes: Gives the bytes of shared memory, for constants.
            args: What the kernel takes.
            copied: Further arrays (B, D, L) that it brings into shared memory.
            channel_blocks: How many channels a CTA may have, the best first.

        Raises:
            ValueError: There are more positions or channels than the kernels count.
        """
        scans = [as_read(scan) for scan in scans]
        scan = scans[0]
        batch, channels, _ = scan.u.shape
        for name, size in dict(channels=channels, length=scan.length).items():
            if size >= 2**29:
                raise ValueError(f"{name} is {size}; the backend 'cuda' counts to 2^29")
        groups = scan.B.shape[1]
        group_size = channels // groups
        delta = given_delta(scan)
        rank = 0 if scan.dt_low_rank is None else delta.shape[1]
        rows = [scan.u, scan.z, None if rank else delta, *copied]
        found = dict(
            constants,
            **dict(RANK=rank, POSITIONS=CHUNK, SOFTPLUS=int(scan.softplus)),
            GATE=int(scan.z is not None),
            U_DTYPE=DTYPES[scan.u.dtype],
            DELTA_DTYPE=DTYPES[delta.dtype],
            B_DTYPE=DTYPES[scan.B.dtype],
            COPY=_copied_bytes([x for x in rows if x is not None], group_size),
            PAIRS=int(rank > 0 and are_pairs(delta)),
            VECTOR=int(all(are_vectors(x, group_size) for x in stored)),
            ARGS=ctypes.sizeof(args),
        )
        found |= _channel_block(group_size, found, shared_bytes, channel_blocks)
        blocks = -(-group_size // found['CHANNELS'])
        return cls(scans, found, blocks, len(scans) * batch * groups * blocks)

    @property
    def chunks(self) -> int:
        """Of a sequence."""
        return -(-self.scans[0].length // CHUNK)

    @property
    def looks_back(self) -> bool:
        """Whether each chunk has a CTA of its own."""
        warps = self.chains * self.constants['THREADS'] // 32
        return self.chunks > 1 and warps < wanted_warps(self.scans[0].u)

    def args(self) -> Args:
        """The structure; it is of use for as long as this object is there."""
        scan = self.scans[0]
        batch, channels, places = scan.u.shape
        groups = scan.B.shape[1]
        width = scan.width or places
        height = places // width
        shift = (height - 1).bit_length()
        args = Args(
            **dict(u=pointer(scan.u), z=pointer(scan.z)),
            u_strides=Strides.of(scan.u),
            z_strides=Strides.of(scan.z),
            delta_strides=Strides.of(given_delta(scan)),
            B_strides=Strides.of(scan.B[:, :, 0]),
            C_strides=Strides.of(scan.C[:, :, 0]),
            **dict(batch=batch, groups=groups, group_size=channels // groups),
            **dict(blocks=self.blocks, chains=self.chains, length=scan.length),
            **dict(width=width, height=height, height_shift=shift),
            # So that 2 t height_inverse >> 32 + height_shift is t // height.
            height_inverse=-(-(2 ** (31 + shift)) // height),
            **dict(chunks=self.chunks, chunks_of_cta=self.chunks),
        )
        for k, one in enumerate(self.scans):
            args.scans[k] = _scan_pointers(one)
        return args

    def launch(self, kernel: Kernel, args: Any, inputs: Args) -> None:
        """Launch CTAs that walk whole sequences, or else look back.

        Args:
            kernel: Which one.
            args: What it takes.
            inputs: What is said there of the inputs, or ``args`` itself.
        """
        on = self.scans[0].u
        grid, threads = self.chains, self.constants['THREADS']
        if self.looks_back:
            entries = inputs.chunks + -(-inputs.chunks // _LOOK_BACK)
            shape = (self.chains, entries, self.constants['CHANNELS'])
            published = on.new_full(shape, -1, dtype=torch.int64)
            inputs.published, inputs.chunks_of_cta = pointer(published), 1
            grid *= inputs.chunks
        shared = self.constants['SHARED']
        kernel.launch(
            self.constants, args, grid=grid, threads=threads, shared=shared, on=on
        )


def wanted_warps(on: Tensor) -> int:
    """So many keep the GPU busy that a tensor is on."""
    return _WARPS * kernels.multiprocessors(on)


def fills_a_gpu(scan: Scan) -> bool:
    """Whether the CTAs of one scan keep a GPU busy, one for each chunk if need be."""
    batch, channels, _ = scan.u.shape
    chunks = -(-scan.length // CHUNK)
    threads = batch * channels // WIDTH * (CHUNK // OWN) * chunks
    return threads // 32 >= wanted_warps(scan.u)


def are_one_length(scans: Sequence[Scan]) -> bool:
    """Whether scans have as many positions, as those of a launch must.

    A table may have padded places, which routes have not.
    """
    return len({scan.length for scan in scans}) == 1


def run_side_by_side(scans: Sequence[Scan]) -> bool:
    """Whether scans of a map are to share a launch, or else follow one another.

    What they give is added up. One after the other they add to one sum, which moves
    fewer bytes than sums of their own, but for small maps, which caches hold.
    """
    several = len(scans) > 1 and are_one_length(scans)
    return several and not fills_a_gpu(scans[0])


def shared_bytes(constants: Constants) -> int:
    """Bytes of shared memory of a CTA, see ``Layout`` in one_state_inputs.h."""
    channels, rank = constants['CHANNELS'], constants['RANK']
    padded = channels + (0 if constants['COPY'] else WIDTH)

    def rows(dtype: str) -> int:
        return 2 * CHUNK * padded * (2 if constants[dtype] else 4)

    found = rows('U_DTYPE') * (1 + constants['GATE'])
    # Places, B and C; states from chunk to chunk, and parameters.
    found += 2 * CHUNK * 3 * 4 + (2 + 3) * channels * 4
    if rank:
        terms, of_weight = (1, 2) if constants['DELTA_DTYPE'] else (3, 3)
        tiles = -(-rank // 16)
        found += terms * CHUNK * (16 * tiles + 8) * 2
        found += of_weight * tiles * channels // 8 * 32 * 8
    else:
        found += rows('DELTA_DTYPE')
    rows_of_team = OWN if rank or constants['ADD'] else 2
    found += CHUNK // OWN * rows_of_team * (channels + 8) * 4
    return found


def as_read(scan: Scan) -> Scan:
    """In dtypes and strides that the kernels read."""
    low_rank, weight = scan.dt_low_rank, parameter(scan.dt_weight)
    delta = scan.delta
    if low_rank is not None and low_rank.shape[1] > LARGEST_RANK:
        assert weight is not None, 'there is one with the low-rank form'
        delta = linear_product(low_rank.mT.float(), weight).mT
        low_rank = weight = None
    u, z = _of_one_dtype(scan.u, scan.z)
    B, C = _of_one_dtype(scan.B, scan.C)
    (delta,), (low_rank,) = _of_one_dtype(delta), _of_one_dtype(low_rank)
    assert u is not None and B is not None and C is not None
    return replace(
        scan,
        u=u,
        A=scan.A.float().contiguous(),
        B=B,
        C=C,
        delta=delta,
        D=parameter(scan.D),
        z=z,
        bias=parameter(scan.bias),
        dt_low_rank=low_rank,
        dt_weight=weight,
    )


def _of_one_dtype(*tensors: Tensor | None) -> list[Tensor | None]:
    """In float32, unless they are of one dtype that the kernels read."""
    dtypes = {x.dtype for x in tensors if x is not None}
    if len(dtypes) > 1 or not dtypes <= DTYPES.keys():
        tensors = tuple(None if x is None else x.float() for x in tensors)
    return [with_short_strides(x) for x in tensors]


def with_short_strides(x: Tensor | None) -> Tensor | None:
    """The kernels multiply places by strides in bytes of 32 bits."""
    if x is not None and x.stride(-1) * x.element_size() >= 2**31:
        x = x.contiguous()
    return x


def given_delta(scan: Scan) -> Tensor:
    """(B, D, L), or the low-rank form (B, R, L)."""
    found = scan.delta if scan.dt_low_rank is None else scan.dt_low_rank
    assert found is not None, 'a scan has one of them'
    return found


def _scan_pointers(scan: Scan) -> ScanPointers:
    reverse = scan.route >= 2
    return ScanPointers(
        delta=pointer(given_delta(scan)),
        **dict(B=pointer(scan.B), C=pointer(scan.C), weight=pointer(scan.dt_weight)),
        **dict(A=pointer(scan.A), D=pointer(scan.D), bias=pointer(scan.bias)),
        order=pointer(scan.order),
        start=scan.length - 1 if reverse else 0,
        step=-1 if reverse else 1,
        columns=scan.route % 2,
    )


def _channel_block(
    group_size: int,
    constants: Constants,
    shared_bytes: Callable[[Constants], int],
    channel_blocks: Sequence[int],
) -> dict[str, int]:
    """Channels of a CTA, and what follows: those of which the fewest are idle."""
    found = []
    for size in channel_blocks:
        sizes = dict(CHANNELS=size, THREADS=size // WIDTH * (CHUNK // OWN))
        sizes['SHARED'] = shared_bytes({**constants, **sizes})
        if sizes['SHARED'] <= _SHARED:
            found.append(sizes)
    return min(found, key=lambda sizes: -group_size % sizes['CHANNELS'])


def byte_strides(x: Tensor) -> list[int]:
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


def are_vectors(x: Tensor, group_size: int) -> bool:
    """Whether the channels of a thread can be stored at once, float32 states too."""
    width = WIDTH * x.element_size()
    return group_size % WIDTH == 0 and _are_aligned(x, group_size, width)


def _are_aligned(x: Tensor, group_size: int, size: int) -> bool:
    """Whether the channels of a group lie side by side, in pieces of ``size`` bytes."""
    batch, channel, position = byte_strides(x)
    found = (x.data_ptr(), batch, position, group_size * x.element_size())
    is_dense = x.shape[1] == 1 or channel == x.element_size()
    return is_dense and not any(n % size for n in found)


def are_pairs(x: Tensor) -> bool:
    """Whether two neighbours of the low-rank form can be read at once."""
    batch, rank, position = byte_strides(x)
    is_dense = rank == x.element_size() and x.shape[1] % 2 == 0
    found = (x.data_ptr(), batch, position)
    return is_dense and not any(n % (2 * x.element_size()) for n in found)
