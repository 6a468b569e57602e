"""What the device can do at best, measured, and the floor that follows from it.

A pass takes at least as long as the bytes it must move, the exponentials it must
evaluate (on a GPU a few units of each multiprocessor do these) and its other
arithmetic, each at the rate measured here; these overlap, so the largest of the
three is the floor. With E = elements (batch, channel, position), W = batch *
groups * N * L values of B or of C, s = bytes of an activation:

=====================  ======================  ==============  ==================
pass                   bytes                   exponentials    multiply-adds
=====================  ======================  ==============  ==================
scan, forward          s (3 E + 2 W)           E (N + 2)       E (5 N + 6)
scan, backward         s (5 E + 4 W)           E (N + 3)       E (14 N + 12)
SS2D, forward          s 2 E                   4 E (N + 2)     4 E (5 N + 6)
SS2D, backward         s 3 E                   4 E (N + 3)     4 E (14 N + 12)
two ways, forward      s 3 E                   E (2 N + 10)    2 E (5 N + 6)
two ways, backward     s 5 E                   E (2 N + 12)    2 E (14 N + 12)
=====================  ======================  ==============  ==================

A softplus counts as two exponentials, a SiLU as two. Of SS2D and of the two ways
of Vim (with convolution, SiLU and gate) only what any implementation must do is
counted: reading the map and writing the merged one; projections are left out.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_device import Device

from mmvssm.analysis.measuring.timing import Effort

EFFORT = Effort(rounds=10, turn=0.0, limit=0.5)
# Values that are copied, values in registers, and operations on each of these.
_COPIED, _HELD, _OPERATIONS = 2**29, 2**22, 4096
# What a GPU does to a value, over and over. torch compiles it by NVRTC.
_KERNEL = """
template <typename T>
T floor_{name}(T x) {{
  const T factor = x;
#pragma unroll 16
  for (int i = 0; i < {operations}; ++i) x = {expression};
  return x;
}}
"""
_EXPRESSIONS = dict(exp2='exp2f(-x)', fma='fmaf(x, factor, 0.5f)')


@dataclass(frozen=True)
class Work:
    """What a pass must do; see the module."""

    bytes: float
    exponentials: float
    multiply_adds: float

    def seconds(self, rates: dict[str, float | None]) -> float:
        """The floor.

        Args:
            rates: Of :func:`measure_rates`; what was not measured counts as free.
        """
        counts = dict(copy=self.bytes, exp2=self.exponentials, fma=self.multiply_adds)
        return max(n / rates[k] for k, n in counts.items() if rates[k])


def scan_work(
    batch: int, groups: int, channels: int, length: int, states: int, size: int
) -> dict[str, Work]:
    """Of the selective scan; ``channels`` are those of a group, ``size`` is s."""
    n, e = states, batch * groups * channels * length
    w = batch * groups * states * length
    return dict(
        forward=Work(size * (3 * e + 2 * w), e * (n + 2), e * (5 * n + 6)),
        backward=Work(size * (5 * e + 4 * w), e * (n + 3), e * (14 * n + 12)),
    )


def ss2d_work(
    batch: int, channels: int, length: int, states: int, size: int
) -> dict[str, Work]:
    """Of the core of SS2D."""
    n, e = states, batch * channels * length
    return dict(
        forward=Work(size * 2 * e, 4 * e * (n + 2), 4 * e * (5 * n + 6)),
        backward=Work(size * 3 * e, 4 * e * (n + 3), 4 * e * (14 * n + 12)),
    )


def two_way_work(
    batch: int, channels: int, length: int, states: int, size: int
) -> dict[str, Work]:
    """Of the core of Vim's mixer."""
    n, e = states, batch * channels * length
    return dict(
        forward=Work(size * 3 * e, e * (2 * n + 10), 2 * e * (5 * n + 6)),
        backward=Work(size * 5 * e, e * (2 * n + 12), 2 * e * (14 * n + 12)),
    )


def floors(work: dict[str, Work], rates: dict[str, float | None]) -> dict[str, float]:
    """Seconds at least, ``forward`` and ``both``."""
    forward, backward = (work[name].seconds(rates) for name in ('forward', 'backward'))
    return dict(forward=forward, both=forward + backward)


def measure_rates(device: Device, quick: bool = False) -> dict[str, float | None]:
    """Bytes, exp2 and multiply-adds of a second, None where not to be had.

    Copied bytes count twice, as read and as written.
    """
    values = 2**16 if quick else _COPIED
    source = torch.randn(values, device=device.name, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    functions = {'copy': lambda: target.copy_(source)}
    counts = {'copy': 2 * source.nbytes}
    held = torch.rand(2**14 if quick else _HELD, device=device.name)
    operations = (16 if quick else _OPERATIONS) if device.is_cuda else 1
    functions |= _arithmetic(device, held, operations)
    counts |= dict.fromkeys(_EXPRESSIONS, held.numel() * operations)
    found = device.measure(functions, EFFORT)
    return {
        name: counts[name] / found[name]['median']
        if 'median' in found.get(name, {})
        else None
        for name in ('copy', 'exp2', 'fma')
    }


def kernel_source(name: str, operations: int) -> str:
    """A function of one value that does nothing but ``exp2`` or ``fma``."""
    return _KERNEL.format(
        name=name, operations=operations, expression=_EXPRESSIONS[name]
    )


def _arithmetic(
    device: Device, held: torch.Tensor, operations: int
) -> dict[str, Callable[[], object]]:
    """Functions that only calculate, so many times on each value."""
    if not device.is_cuda:
        # A stand-in that shows that the rest works.
        return dict(exp2=lambda: torch.exp2(-held), fma=lambda: held * held + 0.5)
    return {
        name: functools.partial(
            torch.cuda.jiterator._create_jit_fn(kernel_source(name, operations)), held
        )
        for name in _EXPRESSIONS
    }
