"""Recorded calls of ops, without the values of their tensors.

A recorded call has the shapes, strides and dtypes of the tensors, and the options. It
can be compared, kept as JSON, sent to another process, and called again there.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmvssm.ops.contract import Call
from mmvssm.ops.gpu_check.orders import make_known, portable
from mmvssm.ops.leaves import leaves_of
from mmvssm.ops.operator import Op, all_ops, public_ops

# The option that holds a word for scan orders.
_ORDERS = 'orders'
_HALVES = ('bfloat16', 'float16')


@dataclass(frozen=True)
class Layout:
    """Shape, strides and dtype of a tensor; the dtype as its name."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, x: Tensor) -> 'Layout':
        """The layout of a tensor."""
        return cls(tuple(x.shape), tuple(x.stride()), _name(x.dtype))

    def places(self) -> int:
        """Number of values in its memory, including gaps."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride))

    def resized(self, axis: int, size: int) -> 'Layout':
        """The layout with another size of an axis; axes keep their order in memory."""
        axis %= len(self.shape)
        old, step = self.shape[axis], self.stride[axis]
        shape, stride = list(self.shape), list(self.stride)
        shape[axis] = size
        for i, s in enumerate(self.stride):
            # The axes with larger strides than this one.
            if i != axis and s >= step * old and s:
                stride[i] = s // old * size if s % old == 0 else s + step * (size - old)
        return Layout(tuple(shape), tuple(stride), self.dtype)


@dataclass(frozen=True)
class OpCall:
    """A call of an op.

    Attributes:
        op: Name of the op.
        tensors: Layouts of its inputs in order; None for an input that is missing.
        options: Names and values; dtypes as their names.
        states: Number of states of a channel, if the op has states.
        count: How often the call was recorded.
    """

    op: str
    tensors: tuple[Layout | None, ...]
    options: tuple[tuple[str, bool | int | float | str], ...]
    states: int | None = None
    count: int = field(default=1, compare=False)

    @classmethod
    def of(cls, op: Op[Any, Any], call: Call) -> 'OpCall':
        """The recorded form of a call of an op."""
        tensors, options = leaves_of(call.inputs), call.options._asdict()
        return cls(
            op.name,
            tuple(None if x is None else Layout.of(x) for x in tensors),
            tuple((name, _plain(name, x)) for name, x in options.items()),
            call.states,
        )

    @property
    def declaration(self) -> Op[Any, Any]:
        """The op's declaration."""
        return all_ops[self.op]

    def option_values(self) -> list[Any]:
        """The values of the options, in the order of the op."""
        kinds = self.declaration.option_types
        for name, value in self.options:
            if name == _ORDERS:
                make_known(str(value))
        return [
            getattr(torch, str(value)) if kinds[name] is torch.dtype else value
            for name, value in self.options
        ]

    def named(self) -> dict[str, Layout]:
        """The layouts of the inputs that are not None, by name."""
        pairs = zip(self.declaration.labels, self.tensors)
        return {name: layout for name, layout in pairs if layout is not None}

    def main_dtype(self) -> str:
        """Name of the dtype that chooses the backend."""
        first = self.tensors[0]
        assert first is not None, 'the first input of an op is always there'
        return first.dtype

    # Similar calls

    def with_dtype(self, dtype: str, of: Sequence[str] = _HALVES) -> 'OpCall':
        """The call with another dtype instead of the given ones, also in options."""
        kinds = self.declaration.option_types
        tensors = (
            replace(x, dtype=dtype) if x is not None and x.dtype in of else x
            for x in self.tensors
        )
        options = (
            (name, dtype if kinds[name] is torch.dtype and value in of else value)
            for name, value in self.options
        )
        return replace(self, tensors=tuple(tensors), options=tuple(options))

    def longer(self) -> 'OpCall':
        """The call with one more position (on a map: one more row)."""
        return self._resized(1, lambda size: size + 1)

    def batch(self) -> int:
        """Size of the batch; 1 for an op without batch."""
        layouts = self.named()
        for name in layouts:
            axis = self.axis_of(name, 0)
            if axis is not None:
                return layouts[name].shape[axis]
        return 1

    def axis_of(self, name: str, which: int) -> int | None:
        """An input's axis of the batch (0) or of the positions (1), or None."""
        # A vector has neither of them.
        if len(self.named()[name].shape) < 2:
            return None
        return self.declaration.axes.get(name, (None, None))[which]

    def with_batch(self, batch: int) -> 'OpCall':
        """The call with another size of the batch."""
        return self._resized(0, lambda size: batch)

    def _resized(self, which: int, change: Callable[[int], int]) -> 'OpCall':
        tensors = list(self.tensors)
        for i, (name, layout) in enumerate(zip(self.declaration.labels, self.tensors)):
            axis = None if layout is None else self.axis_of(name, which)
            if layout is not None and axis is not None:
                tensors[i] = layout.resized(axis, change(layout.shape[axis]))
        return replace(self, tensors=tuple(tensors))

    # As text

    def text(self) -> str:
        """One line that describes the call."""
        tensors = ', '.join(
            f'{name} {_short(layout.dtype)}{list(layout.shape)}'
            for name, layout in self.named().items()
        )
        options = ', '.join(f'{name}={value}' for name, value in self.options)
        return f'{self.op}({tensors}; {options})'

    def as_json(self) -> dict[str, Any]:
        """A form for JSON; :meth:`from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> 'OpCall':
        """The call from what :meth:`as_json` returned."""
        layouts = (
            None
            if x is None
            else Layout(tuple(x['shape']), tuple(x['stride']), x['dtype'])
            for x in found['tensors']
        )
        options = tuple((name, value) for name, value in found['options'])
        return cls(
            found['op'], tuple(layouts), options, found['states'], found['count']
        )


class Recorder(TorchFunctionMode):
    """Record the calls of ops in a ``with`` block, without computing them.

    The ops return tensors with memory but without values. Use it with fake tensors.

    Attributes:
        calls: Each distinct call once, with its count.
    """

    def __init__(self) -> None:
        super().__init__()
        self._counts: dict[OpCall, int] = {}

    @property
    def calls(self) -> list[OpCall]:
        return [replace(call, count=n) for call, n in self._counts.items()]

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        op = public_ops.get(function)
        if op is None:
            return function(*args, **(kwargs or {}))
        call: Call = inspect.unwrap(function)(*args, **(kwargs or {}))
        written = OpCall.of(op, call)
        self._counts[written] = self._counts.get(written, 0) + 1
        return op.finish(op.outputs_like(call.inputs, call.options), call.options)


def digest(calls: Sequence[OpCall], *more: object) -> str:
    """A name for a set of calls, in any order, and for other values."""
    lines = sorted(json.dumps(replace(call, count=1).as_json()) for call in calls)
    lines += map(repr, more)
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:16]


def _plain(name: str, value: Any) -> bool | int | float | str:
    if name == _ORDERS:
        return portable(value)
    if isinstance(value, torch.dtype):
        return _name(value)
    assert isinstance(value, (bool, int, float, str)), 'as options are declared'
    return value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def _short(dtype: str) -> str:
    return dtype.replace('bfloat', 'bf').replace('float', 'f')
