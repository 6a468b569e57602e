"""What the CUDA kernels of the selective scan with several states are told.

Which constants they are compiled for, which blocks of channels a CTA has, and how the
sequence is cut.
"""

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmvssm.ops.cuda import kernels
from mmvssm.ops.cuda.kernels import Kernel
from mmvssm.ops.cuda.scan import Scan
from mmvssm.ops.deterministic_math import linear_product
from mmvssm.ops.kernel_args import fields, parameter, pointer

# Positions of a chunk, and states that a kernel may have.
CHUNK = 16
STATES = (4, 8, 16)
# The backward pass starts from the states before every so many positions: 4, 8 or 16.
# Fewer of them take less memory and more work.
KEPT = 16
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# The largest rank whose low-rank form the kernels multiply themselves.
_LARGEST_RANK = 64
# A sequence is cut into splits until there are so many warps a multiprocessor.
_WARPS = 8
# Of look-back, see many_states_splits.h.
_SPLITS_OF_GROUP = 8
# Bytes of shared memory that every GPU has for a CTA, and that a multiprocessor keeps
# for each.
_SHARED, _SHARED_KEPT = 99 * 1024, 1024


class Rows(ctypes.Structure):
    """See ``many_states.h``."""

    _fields_ = fields((c_void_p, 'data'), (c_int64, 'batch channel place'))

    @classmethod
    def of(cls, x: Tensor | None) -> 'Rows':
        """Of a tensor (B, D, L), all zeros for None."""
        if x is None:
            return cls()
        return cls(x.data_ptr(), *_byte_strides(x))


class Weights(ctypes.Structure):
    """See ``many_states.h``."""

    _fields_ = fields((c_void_p, 'data'), (c_int64, 'batch group state place'))

    @classmethod
    def of(cls, x: Tensor) -> 'Weights':
        """Of a tensor (B, G, N, L)."""
        return cls(x.data_ptr(), *_byte_strides(x))


class Inputs(ctypes.Structure):
    """See ``many_states.h``."""

    _fields_ = fields(
        (c_int32, 'batch groups group_size length places width route states rank'),
        (c_int32, 'blocks chains splits chunks_of_split along states_along'),
        (c_void_p, 'order'),
        (Rows, 'u z delta'),
        (Weights, 'B C'),
        (c_void_p, 'dt_weight A D bias published'),
    )


class ForwardArgs(ctypes.Structure):
    """See ``many_states_forward.cu``."""

    _fields_ = fields(
        (Inputs, 'inputs'),
        (Rows, 'out add'),
        (c_void_p, 'last_state kept'),
        (c_float, 'inverse'),
    )


class BackwardArgs(ctypes.Structure):
    """See ``many_states_backward.cu``."""

    _fields_ = fields(
        (Inputs, 'inputs'),
        (Rows, 'grad_out total grad_u grad_delta grad_z'),
        (c_void_p, 'kept grad_last_state'),
        (c_void_p, 'grad_A grad_D grad_bias grad_B grad_C'),
        (c_float, 'inverse'),
    )


@dataclass(frozen=True)
class Pass:
    """The kernel of one pass.

    Attributes:
        kernel: The kernel.
        shared: Bytes of shared memory of a CTA with given constants.
        threads: That a multiprocessor has registers for.
    """

    kernel: Kernel
    shared: Callable[[dict[str, int]], int]
    threads: int

    def block(self, constants: dict[str, int], group_size: int, shared: int) -> int:
        """Channels of a CTA: few idle threads, then many at once, then few CTAs.

        Args:
            constants: All others.
            group_size: Channels of a group.
            shared: Bytes of shared memory that a CTA may have.
        """

        def used(size: int) -> int:
            return self.shared(dict(constants, THREADS=size))

        def order(size: int) -> tuple[int, int, int]:
            # One CTA may have all but what is kept for it.
            ctas = (shared + _SHARED_KEPT) // (used(size) + _SHARED_KEPT)
            at_once = min(self.threads // size, ctas) * size
            return -group_size % size, -at_once, -size

        return min((n for n in (32, 64, 96, 128) if used(n) <= shared), key=order)


@dataclass
class Call:
    """A scan of at most 16 states as the kernels take it.

    Attributes:
        scan: Inputs of dtypes and strides that the kernels read.
        of_pass: The kernel.
        constants: What it is compiled for.
        blocks: CTAs of a split for each group of each element of the batch.
        chains: CTAs of a split.
        splits, chunks_of_split: Of the sequence.
        published: Memory for what CTAs tell each other.
    """

    scan: Scan
    of_pass: Pass
    constants: dict[str, int]
    blocks: int
    chains: int
    splits: int
    chunks_of_split: int
    published: Tensor | None

    @classmethod
    def of(
        cls,
        scan: Scan,
        of_pass: Pass,
        others: tuple[Tensor | None, ...],
        **options: int,
    ) -> 'Call':
        """For inputs and other arrays (B, D, L).

        Args:
            scan: The inputs, any dtypes and strides.
            of_pass: The kernel.
            others: Other arrays, of dtypes that the kernels read.
            options: Further constants.

        Raises:
            ValueError: There are more positions or channels than the kernels count.
        """
        read = _as_read(scan)
        batch, channels, _ = read.u.shape
        groups, states = read.B.shape[1:3]
        for name, size in dict(channels=channels, length=read.length).items():
            if size >= 2**31:
                raise ValueError(f"{name} is {size}; the backend 'cuda' counts to 2^31")
        group_size = channels // groups
        arrays = [x for x in (read.u, read.delta, read.z, *others) if x is not None]
        constants = _constants(scan, read) | dict(
            VECTOR=int(all(_are_vectors(x, group_size) for x in arrays))
        )
        constants |= options
        threads = of_pass.block(
            constants, group_size, max(_SHARED, kernels.shared_memory(read.u))
        )
        blocks = -(-group_size // threads)
        chains = batch * groups * blocks
        chunks = -(-read.length // CHUNK)
        size = _split_size(max(chains, 1) * threads // 32, chunks, read.u)
        splits = -(-chunks // size)
        published = None
        if splits > 1:
            entries = splits + splits // _SPLITS_OF_GROUP
            words = padded(states) // 2 + 1
            published = read.u.new_full(
                (entries, chains, words, threads), -1, dtype=torch.int64
            )
        constants |= dict(THREADS=threads, CHANNELS=threads, SPLIT=int(splits > 1))
        return cls(read, of_pass, constants, blocks, chains, splits, size, published)

    def launch(self, args: ctypes.Structure) -> None:
        """Put the kernel onto the stream, unless the batch is empty."""
        if not self.chains:
            return
        shared = self.of_pass.shared(self.constants)
        self.of_pass.kernel.launch(
            dict(self.constants, SHARED=shared),
            args,
            grid=self.chains * self.splits,
            threads=self.constants['THREADS'],
            shared=shared,
            on=self.scan.u,
        )

    def inputs(self) -> Inputs:
        """The structure; it is of use for as long as this object is there."""
        scan = self.scan
        batch, channels, places = scan.u.shape
        groups, states = scan.B.shape[1:3]
        low_rank = scan.dt_low_rank
        return Inputs(
            **dict(batch=batch, groups=groups, group_size=channels // groups),
            **dict(length=scan.length, places=places, width=scan.width or places),
            **dict(route=scan.route, states=states),
            rank=0 if low_rank is None else low_rank.shape[1],
            **dict(blocks=self.blocks, chains=self.chains, splits=self.splits),
            chunks_of_split=self.chunks_of_split,
            along=int(scan.u.stride(2) < scan.u.stride(1)),
            states_along=int(scan.B.stride(3) < scan.B.stride(2)),
            order=pointer(scan.order),
            u=Rows.of(scan.u),
            z=Rows.of(scan.z),
            delta=Rows.of(_delta_of(scan)),
            B=Weights.of(scan.B),
            C=Weights.of(scan.C),
            dt_weight=pointer(scan.dt_weight),
            A=pointer(scan.A),
            D=pointer(scan.D),
            bias=pointer(scan.bias),
            published=pointer(self.published),
        )


def padded(states: int) -> int:
    """States of the kernel that a scan of so many gets."""
    return next((size for size in STATES if states <= size), STATES[-1])


def _forward_shared(constants: dict[str, int]) -> int:
    """Bytes of shared memory of a CTA, as many_states_forward.cu lays it out."""
    u, out = (_rows_bytes(constants, name) for name in ('U_DTYPE', 'OUT_DTYPE'))
    add = _rows_bytes(constants)
    rows = u * (2 + constants['GATE']) + add * constants['ADD']
    in_add = constants['ADD'] and not constants['TOTAL'] and out == add
    if out != u and not in_add:
        rows += out
    return rows + _staged_bytes(constants)


def _backward_shared(constants: dict[str, int]) -> int:
    """Bytes of shared memory of a CTA, as many_states_backward.cu lays it out."""
    names = ('U_DTYPE', 'GRAD_OUT_DTYPE', 'GRAD_U_DTYPE', 'GRAD_DELTA_DTYPE')
    u, grad_out, grad_u, grad_delta = (_rows_bytes(constants, name) for name in names)
    gate, threads = constants['GATE'], constants['THREADS']
    rows = (1 + (gate > 0)) * u + grad_out + (gate == 2) * _rows_bytes(constants)
    if constants['ADD'] or grad_u != u:
        rows += grad_u
    if grad_delta != grad_out:
        rows += grad_delta
    # Products on tensor cores take what they multiply in two parts.
    parts = 2 if constants['B_DTYPE'] and constants['STATES'] > 4 else 1
    steps = _steps_bytes(constants)
    found = rows + parts * steps * 5 // 4 + (0 if constants['RANK'] else steps)
    found += CHUNK * threads * 4
    found += (4 if constants['KEPT'] == 4 else 3) * constants['STATES'] * threads * 4
    # What threads exchange, and the output before the gate with a factor of it.
    found += threads // 32 * (3 if gate == 3 else 2) * 4 * (32 * 4 + 4) * 4
    found += threads * 4 * 4 * (gate == 3)
    # There is one buffer for B and C, and D and the bias are here, too.
    found += 2 * threads * 4 - 2 * CHUNK * constants['STATES'] * 4
    return found + _staged_bytes(constants)


def _rows_bytes(constants: dict[str, int], dtype: str | None = None) -> int:
    """Of the rows of a chunk, by default float32."""
    size = 2 if dtype is not None and constants[dtype] else 4
    return (
        constants['THREADS'] // 32 * CHUNK * (32 if constants['VECTOR'] else 34) * size
    )


def _steps_bytes(constants: dict[str, int]) -> int:
    return CHUNK * (constants['THREADS'] + 8) * 4


def _staged_bytes(constants: dict[str, int]) -> int:
    """Of B and C, of delta or what it is made of, and of the places."""
    rank = constants['RANK']
    found = 2 * CHUNK * 2 * constants['STATES'] * 4 + 8 * CHUNK * 4
    if not rank:
        return found + 2 * _rows_bytes(constants, 'DELTA_DTYPE')
    terms = 1 if constants['DELTA_DTYPE'] else 3
    found += 2 * terms * CHUNK * (rank + 8) * 2 + _steps_bytes(constants)
    return found + rank // 16 * constants['WEIGHT_TERMS'] * 4 * constants['THREADS'] * 8


def _constants(scan: Scan, read: Scan) -> dict[str, int]:
    """Those that the inputs have, as they were and as they are read."""
    low_rank, delta = read.dt_low_rank, _delta_of(read)
    rows = [read.B, read.C]
    if low_rank is not None:
        rows.append(low_rank)
    terms = 3
    if delta.dtype != torch.float32:
        # A product of 16 bits with float32 is exact enough in two.
        weight = scan.dt_weight
        terms = 1 if weight is not None and weight.dtype == delta.dtype else 2
    return dict(
        STATES=padded(read.A.shape[1]),
        RANK=0 if low_rank is None else -(-low_rank.shape[1] // 16) * 16,
        **dict(POSITIONS=CHUNK, KEPT=KEPT, WEIGHT_TERMS=terms),
        **dict(SOFTPLUS=int(read.softplus), GATE=int(read.z is not None)),
        U_DTYPE=DTYPES[read.u.dtype],
        DELTA_DTYPE=DTYPES[delta.dtype],
        B_DTYPE=DTYPES[read.B.dtype],
        PAIRS=int(all(map(_are_pairs, rows))),
    )


def _as_read(scan: Scan) -> Scan:
    """In dtypes and strides that the kernels read."""
    delta, low_rank, weight = scan.delta, scan.dt_low_rank, parameter(scan.dt_weight)
    if low_rank is not None and low_rank.shape[1] > _LARGEST_RANK:
        assert weight is not None, 'there is one with the low-rank form'
        delta = linear_product(low_rank.mT.float(), weight).mT
        low_rank = weight = None
    u, B, C, z = scan.u, scan.B, scan.C, scan.z
    if z is not None and z.dtype != u.dtype:
        u, z = u.float(), z.float()
    if B.dtype != C.dtype:
        B, C = B.float(), C.float()
    return replace(
        scan,
        u=readable(u),
        z=None if z is None else readable(z),
        B=readable(B),
        C=readable(C),
        delta=None if delta is None else readable(delta),
        dt_low_rank=None if low_rank is None else readable(low_rank),
        dt_weight=weight,
        A=parameter(scan.A),
        D=parameter(scan.D),
        bias=parameter(scan.bias),
    )


def readable(x: Tensor) -> Tensor:
    """The tensor in a dtype and with strides that the kernels read.

    They multiply places by strides in bytes of 32 bits.
    """
    x = x if x.dtype in DTYPES else x.float()
    return x.contiguous() if x.stride(-1) * x.element_size() >= 2**31 else x


def _delta_of(scan: Scan) -> Tensor:
    """What step sizes are made of."""
    delta = scan.delta if scan.dt_low_rank is None else scan.dt_low_rank
    assert delta is not None, 'a scan has one of the two'
    return delta


FORWARD = Pass(
    Kernel('many_states_forward.cu', 'many_states_forward'), _forward_shared, 512
)
BACKWARD = Pass(
    Kernel('many_states_backward.cu', 'many_states_backward'), _backward_shared, 256
)


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
