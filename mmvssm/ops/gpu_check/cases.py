"""The calls that are checked, and how thoroughly each one is checked.

There are three lists: the calls of a model with similar ones; calls of an op, for
programs whose model is not known; and everything.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmvssm.ops.add_norm import add_rms_norm
from mmvssm.ops.bidirectional_scan import Direction, bidirectional_scan
from mmvssm.ops.gpu_check.calls import OpCall, Recorder
from mmvssm.ops.linear_attention import linear_attention
from mmvssm.ops.operator import all_ops
from mmvssm.ops.scan_orders import count_orders, list_scan_orders
from mmvssm.ops.selective_scan import selective_scan
from mmvssm.ops.ss2d_scan import ss2d_scan

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Shorter than a chunk, one chunk, one position more, as in a model, several splits.
_LENGTHS = (1, 15, 16, 17, 197, 600, 3137)
_STATES = (1, 8, 16)


class Case(NamedTuple):
    """A call to check.

    Attributes:
        call: The call.
        repeats: How often the call is repeated to compare its bits.
        timed: Whether its time counts.
    """

    call: OpCall
    repeats: int = 2
    timed: bool = False


def of_calls(calls: Sequence[OpCall]) -> list[Case]:
    """The calls of a model, also in float32, and each with one more position."""
    found: dict[OpCall, Case] = {}
    for call in calls:
        found[call] = Case(call, timed=True)
        for other in (call.longer(), call.with_dtype('float32')):
            found.setdefault(other, Case(other))
        exact = call.with_dtype('float32').longer()
        found.setdefault(exact, Case(exact))
    return list(found.values())


def of_op(name: str, small: bool = False) -> list[Case]:
    """Calls of one op: those of published models, and odd sizes.

    Args:
        name: Name of the op.
        small: Whether to make only a few small calls, for a CPU.
    """
    typical, odd = _OWN.get(name, ((), ()))
    found: list[Case] = []
    for dtype in _DTYPES[:2]:
        # The time of typical calls counts.
        for batch, sizes in ((3, odd),) if small else ((16, typical), (3, odd)):
            timed = dtype == torch.bfloat16 and (small or sizes is typical)
            for arguments in sizes:
                call = _call(_MAKERS[name], batch, *arguments, dtype=dtype)
                found += [Case(call, timed=timed), Case(call.longer())]
    return found


def everything(small: bool = False) -> list[Case]:
    """Every option, dtype, scan order and kind of length, with many repeats."""
    own = [case for name in _OWN for case in of_op(name, small)]
    every = itertools.chain(_scans(), _maps(), _pairs(), _others())
    return own + [Case(call, repeats=20) for call in every]


def with_kernels(cases: Sequence[Case], backend: str) -> list[Case]:
    """The cases of ops for which the backend has its own kernels."""
    return [case for case in cases if backend in all_ops[case.call.op].backends]


# Calls of a size


def _call(make: Callable[..., object], *sizes: Any, **options: Any) -> OpCall:
    with Recorder() as recorder:
        make(*sizes, **options)
    call: OpCall = recorder.calls[0]
    return call


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device='meta')


def _scan(
    batch: int,
    channels: int,
    length: int,
    states: int,
    groups: int = 1,
    *,
    dtype: torch.dtype,
    optional: Sequence[str] = ('D', 'delta_bias'),
    softplus: bool = True,
    last_state: bool = False,
    channels_last: bool = True,
) -> None:
    def sequence(*sizes: int) -> Tensor:
        if channels_last:
            return _tensor(batch, length, *sizes, dtype=dtype).movedim(1, -1)
        return _tensor(batch, *sizes, length, dtype=dtype)

    selective_scan(
        *(sequence(channels), sequence(channels), _tensor(channels, states)),
        *(sequence(groups, states), sequence(groups, states)),
        D=_tensor(channels) if 'D' in optional else None,
        z=sequence(channels) if 'z' in optional else None,
        delta_bias=_tensor(channels) if 'delta_bias' in optional else None,
        delta_softplus=softplus,
        return_last_state=last_state,
    )


def _map(
    batch: int,
    channels: int,
    height: int,
    width: int,
    rank: int,
    states: int,
    orders: str = 'cross',
    *,
    dtype: torch.dtype,
    channels_last: bool = True,
) -> None:
    sets = count_orders(orders, height, width)
    x = _tensor(batch, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)
    ss2d_scan(
        x if channels_last else _tensor(*x.shape, dtype=dtype),
        _tensor(sets, rank + 2 * states, channels, dtype=dtype),
        _tensor(sets, channels, rank, dtype=dtype),
        _tensor(sets, channels),
        _tensor(sets * channels, states),
        _tensor(sets * channels),
        orders=orders,
    )


def _pair(
    batch: int,
    channels: int,
    length: int,
    rank: int,
    states: int,
    taps: int = 4,
    *,
    dtype: torch.dtype,
    average: bool = False,
) -> None:
    way = Direction(
        conv_weight=_tensor(channels, taps),
        conv_bias=_tensor(channels),
        x_proj_weight=_tensor(rank + 2 * states, channels, dtype=dtype),
        dt_proj_weight=_tensor(channels, rank, dtype=dtype),
        dt_proj_bias=_tensor(channels),
        A=_tensor(channels, states),
        D=_tensor(channels),
    )
    x = _tensor(batch, length, channels, dtype=dtype).mT
    bidirectional_scan(x, torch.empty_like(x), way, way, average=average)


def _norm(
    batch: int,
    length: int,
    channels: int,
    *,
    dtype: torch.dtype,
    residual: torch.dtype | None = torch.float32,
) -> None:
    shape = (batch, length, channels)
    stream = None if residual is None else _tensor(*shape, dtype=residual)
    x = _tensor(*shape, dtype=dtype)
    add_rms_norm(x, _tensor(channels), stream, residual_in_fp32=True)


def _attention(
    batch: int,
    length: int,
    channels: int,
    heads: int,
    *,
    dtype: torch.dtype,
    rotary: bool = True,
    normalise: bool = True,
) -> None:
    q, k, v = (_tensor(batch, length, channels, dtype=dtype) for _ in range(3))
    tables = _tensor(length, channels // 2), _tensor(length, channels // 2)
    linear_attention(q, k, v, heads, tables if rotary else None, normalise=normalise)


_MAKERS: dict[str, Callable[..., None]] = dict(
    selective_scan=_scan,
    ss2d_scan=_map,
    bidirectional_scan=_pair,
    add_rms_norm=_norm,
    linear_attention=_attention,
)
# Sizes of published models without the batch, and odd ones.
_OWN: dict[str, tuple[Sequence[tuple[Any, ...]], Sequence[tuple[Any, ...]]]] = dict(
    selective_scan=(
        [(384, 3136, 1, 4), (768, 197, 16)],
        [(70, 17, 8), (36, 600, 3, 2)],
    ),
    ss2d_scan=(
        [(96, 56, 56, 6, 1), (192, 28, 28, 12, 1), (384, 14, 14, 24, 1)]
        + [(768, 7, 7, 48, 1), (192, 28, 28, 6, 16)],
        [(70, 5, 13, 3, 1), (36, 9, 7, 2, 8, 'zigzag')],
    ),
    bidirectional_scan=(
        [(384, 197, 12, 16), (768, 208, 24, 16)],
        [(70, 17, 3, 8, 3), (36, 600, 2, 1)],
    ),
    add_rms_norm=([(197, 192), (197, 384), (208, 768)], [(7, 70), (1, 1)]),
    linear_attention=(
        [(3136, 64, 2), (784, 128, 4), (196, 256, 8), (49, 512, 16)],
        [(17, 24, 2), (1, 12, 3)],
    ),
)


# Everything


def _scans() -> Iterator[OpCall]:
    """Selective scans. Options alternate, so that each one comes with every length."""
    optional = [
        [name for name, there in zip(('D', 'z', 'delta_bias'), choice) if there]
        for choice in itertools.product((True, False), repeat=3)
    ]
    every = itertools.product(_DTYPES, _STATES, _LENGTHS)
    for i, (dtype, states, length) in enumerate(every):
        for turn in range(2):
            yield _call(
                *(_scan, 2, 70, length, states, 1 + i % 2),
                dtype=dtype,
                optional=optional[(i + 3 * turn) % len(optional)],
                softplus=(i + turn) % 3 > 0,
                last_state=(i // 2 + turn) % 2 == 0,
                channels_last=turn == 0,
            )
    # So long that a single sequence fills a GPU.
    for states in _STATES:
        yield _call(_scan, 1, 40, 40_000, states, dtype=torch.float32)


def _maps() -> Iterator[OpCall]:
    """Maps in every scan order, with alternating ranks and numbers of states."""
    sizes = itertools.cycle([(1, 1), (1, 17), (16, 1), (5, 13), (14, 14), (25, 24)])
    ranks = itertools.cycle([1, 6, 12, 24, 48])
    states = itertools.cycle(_STATES)
    for orders in list_scan_orders():
        for dtype in _DTYPES:
            for last in (True, False):
                size = next(sizes)
                yield _call(
                    *(_map, 2, 70, *size, next(ranks), next(states), orders),
                    dtype=dtype,
                    channels_last=last,
                )
    for dtype, rank in itertools.product(_DTYPES, (6, 12, 24, 48)):
        yield _call(_map, 1, 96, 56, 57, rank, 1, dtype=dtype)


def _pairs() -> Iterator[OpCall]:
    """Bidirectional scans with convolutions of every length."""
    taps = itertools.cycle([4, 3, 2, 1])
    average = itertools.cycle([True, False])
    for dtype, states, length in itertools.product(_DTYPES, _STATES, _LENGTHS):
        sizes = (2, 70, length, 5, states, next(taps))
        yield _call(_pair, *sizes, dtype=dtype, average=next(average))


def _others() -> Iterator[OpCall]:
    """Norms and linear attention."""
    for dtype, residual in itertools.product(_DTYPES, (None, *_DTYPES)):
        for channels in (1, 70, 192, 1025):
            yield _call(_norm, 2, 17, channels, dtype=dtype, residual=residual)
    flags = itertools.product((True, False), repeat=2)
    for (rotary, normalise), dtype in itertools.product(flags, _DTYPES):
        for length in _LENGTHS:
            yield _call(
                *(_attention, 2, length, 48, 3),
                dtype=dtype,
                rotary=rotary,
                normalise=normalise,
            )
