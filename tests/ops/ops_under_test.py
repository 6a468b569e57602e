"""Every op with inputs of any size, for what is tested of all ops alike."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mmvssm import ops
from mmvssm.layers import rotary_tables
from mmvssm.ops.contract import Call
from mmvssm.ops.leaves import leaves_of
from mmvssm.ops.operator import Op, public_ops

from . import bidirectional_inputs
from .scan_inputs import gradients, scan_inputs, ss2d_inputs


@dataclass(frozen=True)
class Case:
    """An op with inputs.

    Attributes:
        inputs: By name, leaves that require gradients.
        call: The op on such inputs, with ``backend=``; a tuple of outputs.
        function: The op's public function.
    """

    inputs: dict[str, Tensor]
    call: Callable[..., tuple[Tensor, ...]]
    function: Callable[..., Any]

    @property
    def op(self) -> Op:
        """The op's declaration."""
        return public_ops[self.function]

    def arguments(self, backend: str, keep: bool = True) -> tuple:
        """What torch's op takes for this call."""
        call = self.asked(backend)
        return (*leaves_of(call.inputs), *call.options, keep, backend)

    def asked(self, backend: str) -> Call:
        """What the public function asks of its op."""
        found = []

        class Asked(Exception):
            pass

        def route(call):
            found.append(call)
            raise Asked

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.op, 'route', route)
            with contextlib.suppress(Asked):
                self.call(self.inputs, backend=backend)
        return found[0]

    def run(self, backend: str | None = None) -> dict[str, Tensor]:
        """Outputs and gradients by name."""
        outputs = self.call(self.inputs, backend=backend)
        named = {f'output {i}': out for i, out in enumerate(outputs)}
        return named | gradients(outputs, self.inputs)


def selective_scan(*sizes, dtype=torch.float64, channels_last=False):
    """Of batch, channels, length, states and groups."""
    inputs = scan_inputs(*sizes, dtype=dtype, channels_last=channels_last)
    options = dict(delta_softplus=True, return_last_state=True)
    scan = ops.selective_scan
    return Case(inputs, lambda x, **k: scan(**x, **options, **k), scan)


def ss2d_scan(*sizes, dtype=torch.float64, channels_last=False):
    """Of batch, channels, height, width, rank and states."""
    inputs = ss2d_inputs(*sizes, dtype=dtype, channels_last=channels_last)
    return Case(inputs, lambda x, **k: (ops.ss2d_scan(**x, **k),), ops.ss2d_scan)


def bidirectional_scan(*sizes, dtype=torch.float64):
    """Of batch, channels, length, rank, states and taps of the convolution."""
    inputs = bidirectional_inputs.make_inputs(*sizes, dtype=dtype)
    scan = bidirectional_inputs.call
    return Case(inputs, lambda x, **k: (scan(x, **k),), ops.bidirectional_scan)


def add_rms_norm(rows, channels, *, dtype=torch.float64):
    shapes = dict(x=(rows, channels), weight=(channels,), residual=(rows, channels))
    norm = ops.add_rms_norm
    return Case(_random(shapes, dtype), lambda x, **k: norm(**x, **k), norm)


def linear(rows, terms, outputs, *, dtype=torch.float64):
    shapes = dict(x=(rows, terms), weight=(outputs, terms), bias=(outputs,))
    linear = ops.linear
    return Case(_random(shapes, dtype), lambda x, **k: (linear(**x, **k),), linear)


def linear_attention(batch, height, width, channels, heads, *, dtype=torch.float64):
    inputs = _random(dict.fromkeys('qkv', (batch, height * width, channels)), dtype)
    tables = rotary_tables(height, width, channels, like=inputs['q']).unbind()
    attend = partial(ops.linear_attention, heads=heads, rotary=tables)
    return Case(inputs, lambda x, **k: (attend(**x, **k),), ops.linear_attention)


def _random(shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    return {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}


# Small sizes, for what looks at every value or is slow: no multiples of anything.
SMALL = {
    selective_scan: (2, 6, 11, 3, 2),
    ss2d_scan: (2, 5, 3, 4, 2, 3),
    bidirectional_scan: (2, 5, 7, 2, 3, 4),
    add_rms_norm: (6, 7),
    linear: (5, 6, 3),
    linear_attention: (2, 2, 3, 8, 2),
}

# Sizes at which torch cuts the work among threads and libraries cut long sums:
# large maps, many rows, wide layers, single rows and columns, and no multiples of
# the widths of vectors.
LONG = {
    selective_scan: [(2, 96, 3136, 1, 4), (1, 384, 196, 16, 1), (1, 7, 333, 5, 1)],
    ss2d_scan: [
        (1, 96, 56, 56, 6, 1),
        (2, 192, 28, 28, 12, 1),
        (1, 384, 14, 14, 24, 1),
        (2, 32, 33, 23, 4, 16),
        (8, 16, 28, 28, 1, 1),
    ],
    bidirectional_scan: [
        (1, 384, 197, 12, 16, 4),
        (1, 96, 1025, 6, 4, 4),
        (16, 48, 300, 3, 1, 4),
    ],
    add_rms_norm: [(2050, 193), (50000, 1)],
    linear: [
        (394, 384, 56),
        (1025, 96, 56),
        (6, 20, 56),
        (1, 3136, 17),
        (3136, 17, 1),
        (24000, 64, 64),
        (8, 1536, 96),
    ],
    linear_attention: [(2, 33, 97, 24, 2), (1, 14, 14, 384, 1), (1, 56, 56, 64, 2)],
}


def case_name(value) -> str:
    """Name of a parameter in the name of a test."""
    if callable(value):
        return value.__name__
    return 'x'.join(map(str, value)) if isinstance(value, tuple) else str(value)
