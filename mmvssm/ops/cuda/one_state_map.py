"""The scans of a map with one state a channel, merged on chip.

A CTA walks all scans of a block of channels over a whole map and keeps their sum in
shared memory, see ``one_state_map.h``: nothing but the output is written. It takes maps
that fit there, and only where there are enough of them to keep a GPU busy.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_int32
from typing import NamedTuple

from torch import Tensor

from mmvssm.ops.cuda import kernels
from mmvssm.ops.cuda.kernels import Constants, Kernel
from mmvssm.ops.cuda.one_state_call import (
    CHUNK,
    DTYPES,
    LARGEST_RANK,
    MAX_SCANS,
    WIDTH,
    Args,
    Call,
    Strides,
    are_one_length,
    are_pairs,
    are_vectors,
    as_read,
    given_delta,
    wanted_warps,
)
from mmvssm.ops.cuda.scan import Scan
from mmvssm.ops.kernel_args import fields, pointer

MAP = Kernel('one_state_map.cu', 'one_state_map')
# Channels of a warp.
_WARP_CHANNELS = 16
# Warps of a CTA: side by side in the channels, in the positions, and in the batch.
_SHAPES = ((4, 1, 4), (4, 4, 1), (2, 8, 1), (1, 16, 1))
# So many warps a multiprocessor is to hold.
_RESIDENT = 16
# Bytes of shared memory that CUDA adds to a CTA's.
_RESERVED = 1024


class MapArgs(ctypes.Structure):
    """See ``one_state_map.h``."""

    _fields_ = [
        ('inputs', Args),
        *fields((c_int32, 'count elements sum_bytes fold')),
    ]


class LaunchConfig(NamedTuple):
    """How a map is shared out.

    Attributes:
        constants: What the kernel is compiled for.
        shared: Bytes of shared memory of a CTA.
        blocks: Of channels.
        groups: Of batch elements.
    """

    constants: dict[str, int]
    shared: int
    blocks: int
    groups: int


def forward_on_chip(
    scans: Sequence[Scan], out: Tensor, saved: Sequence[Tensor] | None
) -> bool:
    """Scan a map along several orders and add up, if one launch can do that well.

    Args:
        scans: The inputs, ``u`` and all strides the same.
        out: (B, D, L), to be written; (B, L, D) is contiguous.
        saved: See :func:`mmvssm.ops.cuda.one_state.forward_merged`.

    Returns:
        Whether it was done.
    """
    fit = len(scans) <= MAX_SCANS and are_one_length(scans)
    if not fit or not all(map(_is_readable, scans)):
        return False
    scans = [as_read(scan) for scan in scans]
    config = _choose_config(scans, out)
    if config is None:
        return False
    call = Call(scans, config.constants, config.blocks, config.groups * config.blocks)
    args = MapArgs(
        inputs=call.args(),
        count=len(scans),
        elements=len(out),
        sum_bytes=_sum_bytes(config.constants, out),
        fold=_fold(scans[0].width),
    )
    args.inputs.batch, args.inputs.out_strides = config.groups, Strides.of(out)
    for k in range(len(scans)):
        own = args.inputs.scans[k]
        own.out = pointer(out)
        own.saved = None if saved is None else pointer(saved[k])
    threads, on = config.constants['THREADS'], scans[0].u
    MAP.launch(
        config.constants,
        args,
        grid=call.chains,
        threads=threads,
        shared=config.shared,
        on=on,
    )
    return True


def _is_readable(scan: Scan) -> bool:
    """Whether B and C are behind the low-rank form, in one row of memory."""
    low_rank = scan.dt_low_rank
    if low_rank is None or scan.z is not None or scan.width == 0:
        return False
    rank = low_rank.shape[1]
    return (
        rank <= LARGEST_RANK
        and scan.B.shape[1] == 1
        and low_rank.stride(1) == 1
        and low_rank.dtype in DTYPES
        and all(
            _is_behind(low_rank, x[:, 0], rank + i)
            for i, x in enumerate((scan.B, scan.C))
        )
    )


def _is_behind(low_rank: Tensor, x: Tensor, columns: int) -> bool:
    """Whether (B, 1, L) has the memory so many columns behind the first one."""
    return (
        x.dtype == low_rank.dtype
        and x.stride()[::2] == low_rank.stride()[::2]
        and x.untyped_storage().data_ptr() == low_rank.untyped_storage().data_ptr()
        and x.storage_offset() - low_rank.storage_offset() == columns
    )


def _choose_config(scans: Sequence[Scan], out: Tensor) -> LaunchConfig | None:
    """The one with the fewest idle channels that keeps the device busy, if any does."""
    scan = scans[0]
    batch, channels, _ = out.shape
    low_rank = scan.dt_low_rank
    assert low_rank is not None, 'it was looked for'
    if not all(are_vectors(x, channels) for x in (scan.u, out)):
        return None
    chunks = -(-scan.length // CHUNK)
    limit = kernels.shared_memory(scan.u)
    configs = []
    for sets, parts, elements in _SHAPES:
        warps, block = sets * parts * elements, sets * _WARP_CHANNELS
        constants = dict(
            **dict(CHANNELS=block, POSITIONS=parts * elements * CHUNK),
            **dict(ELEMENTS=elements, THREADS=32 * warps),
            **dict(RANK=low_rank.shape[1], SOFTPLUS=int(scan.softplus), VECTOR=1),
            U_DTYPE=DTYPES[scan.u.dtype],
            DELTA_DTYPE=DTYPES[low_rank.dtype],
            OUT_DTYPE=DTYPES[out.dtype],
            PAIRS=int(all(are_pairs(given_delta(x)) for x in scans)),
            **dict(ARGS=ctypes.sizeof(Args), MAP_ARGS=ctypes.sizeof(MapArgs)),
        )
        constants['MAP_SHARED'] = fixed = _fixed_bytes(constants)
        shared = fixed + elements * _sum_bytes(constants, out)
        blocks, groups = -(-channels // block), -(-batch // elements)
        resident = (limit + _RESERVED) // (shared + _RESERVED) * warps
        if (
            parts <= chunks
            and shared <= limit
            and resident >= _RESIDENT
            and batch * blocks * sets * parts >= wanted_warps(scan.u)
        ):
            configs.append(LaunchConfig(constants, shared, blocks, groups))
    return min(configs, key=_channels_scanned, default=None)


def _channels_scanned(config: LaunchConfig) -> int:
    """Channels of batch elements, idle ones too."""
    own = config.constants['CHANNELS'] * config.constants['ELEMENTS']
    return config.blocks * config.groups * own


def _sum_bytes(constants: Constants, out: Tensor) -> int:
    """Of a map; its cells are exchanged in pairs, see cell_of in one_state_map.h."""
    places = out.shape[2]
    return (places + places % 2) * constants['CHANNELS'] * 4


def _fixed_bytes(constants: Constants) -> int:
    """Bytes of shared memory before the sum, see ``MapLayout`` in one_state_map.h."""
    channels, warps = constants['CHANNELS'], constants['THREADS'] // 32
    parts, elements = constants['POSITIONS'] // CHUNK, constants['ELEMENTS']
    terms = 2 if constants['DELTA_DTYPE'] else 3
    found = MAX_SCANS * 2 * channels * 4
    found += elements * (MAX_SCANS * WIDTH * 32 + channels * 8)
    found += MAX_SCANS * terms * -(-constants['RANK'] // 16) * channels // 8 * 32 * 8
    found += 2 * parts * channels * 8 + 2 * elements * channels * 4
    if channels > _WARP_CHANNELS:
        pairs = -(-constants['RANK'] // 16) * 2 * parts * CHUNK * WIDTH
        found += pairs * (4 if constants['DELTA_DTYPE'] else 8)
    return found + warps * 2 * 2 * CHUNK * 4


def _fold(width: int) -> int:
    """The bit of a place that is another one 8 rows of the map on, unless it is 3."""
    lowest = (width & -width).bit_length() - 1
    return lowest + 3 if lowest else 31
