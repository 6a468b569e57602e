"""Values for a recorded call, similar to those of a trained model.

A batch of real size is too large for a check in float64. So the batch consists of a few
distinct elements in random order. The results of these few are known in float64, and so
are those of the whole batch. The gradient of a weight is the sum over the few elements,
each times the number of its copies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvssm.ops.gpu_check.calls import Layout, OpCall

# The most distinct elements of a batch, and the most values that they may have. With
# all intermediate results in float64 these need a few GB.
DISTINCT, _VALUES = 3, 2**24
# Inputs that never get a gradient.
_CONSTANTS = ('cos', 'sin')
# Step sizes before the softplus, at the start of a training.
_LOW, _HIGH = (math.log(math.expm1(step)) for step in (1e-3, 1e-1))


@dataclass
class Values:
    """Values of a call's tensors.

    Attributes:
        call: The call.
        few: Inputs in float64 with the distinct elements of the batch.
        places: For every element of the batch, the number of its distinct element.
        few_grads: Gradients of the outputs for ``few`` in float64; None for an output
            without gradient.
    """

    call: OpCall
    few: list[Tensor | None]
    places: list[int]
    few_grads: list[Tensor | None]

    @classmethod
    def of(cls, call: OpCall, device: torch.device, seed: int = 0) -> 'Values':
        """Random values; the same call and seed give the same values."""
        generator = torch.Generator().manual_seed(seed)
        batch = call.batch()
        distinct = min(batch, _distinct(call))
        # No period: a wrong stride between elements must change the results.
        rest = torch.randint(distinct, (batch - distinct,), generator=generator)
        places = torch.cat((torch.arange(distinct), rest))
        places = places[torch.randperm(batch, generator=generator)]
        small = call.with_batch(distinct)
        few = [
            None if x is None else _random(call, name, x, generator).to(device)
            for name, x in zip(call.declaration.labels, small.tensors)
        ]
        inputs, options = packed(small, [empty(x) for x in small.tensors])
        outputs = call.declaration.outputs_like(inputs, options)
        few_grads = [
            _rounded(_normal(out.shape, generator), out.dtype).to(device)
            if wanted
            else None
            for out, wanted in zip(outputs, graded(call))
        ]
        return cls(call, few, places.tolist(), few_grads)

    def counts(self) -> list[int]:
        """How many copies of each distinct element the batch has."""
        return [self.places.count(i) for i in range(max(self.places) + 1)]

    def fill(self, tensors: Sequence[Tensor | None]) -> None:
        """Write the values of the inputs into tensors of the call's layouts."""
        for name, x, values in zip(self.call.declaration.labels, tensors, self.few):
            if x is None or values is None:
                continue
            axis = self.call.axis_of(name, 0)
            if axis is None:
                x.copy_(values)
            else:
                self._spread(x.movedim(axis, 0), values.movedim(axis, 0))

    def grads(self, outputs: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of the outputs of the whole call, with their dtypes and strides."""
        found: list[Tensor | None] = []
        for out, values in zip(outputs, self.few_grads):
            grad = None if values is None else torch.empty_like(out)
            if grad is not None and values is not None:
                self._spread(grad, values)
            found.append(grad)
        return found

    def _spread(self, x: Tensor, values: Tensor) -> None:
        for element, place in zip(x, self.places):
            element.copy_(values[place])


def _distinct(call: OpCall) -> int:
    first = call.tensors[0]
    assert first is not None, 'the first input of an op is always there'
    return max(1, min(DISTINCT, _VALUES * call.batch() // max(first.places(), 1)))


def graded(call: OpCall) -> list[bool]:
    """For every output, whether it gets a gradient; only if the call returns it."""
    options = dict(call.options)
    return [bool(options.get(f'return_{x}', True)) for x in call.declaration.returns]


def wanted(call: OpCall) -> list[bool]:
    """For every input, whether its gradient is wanted."""
    return [
        x is not None and name not in _CONSTANTS
        for name, x in zip(call.declaration.labels, call.tensors)
    ]


def packed(call: OpCall, tensors: Sequence[Any]) -> tuple[Any, Any]:
    """Inputs and options in the form that the op takes."""
    return call.declaration.pack(tensors, call.option_values())


def empty(layout: Layout | None, device: str = 'meta') -> Tensor | None:
    """A tensor of a layout, by default without memory."""
    if layout is None:
        return None
    dtype = getattr(torch, layout.dtype)
    return torch.empty_strided(layout.shape, layout.stride, dtype=dtype, device=device)


def _random(
    call: OpCall, name: str, layout: Layout, generator: torch.Generator
) -> Tensor:
    """Float64 values that the layout's dtype can represent exactly."""
    kind, shape = name.rpartition('.')[2], layout.shape
    x = _normal(shape, generator)
    if kind == 'A':
        x = -x.exp()
    elif kind in ('delta_bias', 'dt_proj_bias', 'dt_projs_bias'):
        x = _LOW + (_HIGH - _LOW) * torch.rand(shape, generator=generator).double()
    if kind.startswith('delta') and not dict(call.options)['delta_softplus']:
        # Step sizes without softplus must not be negative, or the state would grow.
        x = F.softplus(x - 3)
    elif kind.endswith('weight') and x.ndim > 1:
        x /= shape[-1] ** 0.5
    elif kind in _CONSTANTS:
        angles = torch.arange(x.numel(), dtype=torch.float64).view(shape)
        x = angles.cos() if kind == 'cos' else angles.sin()
    return _rounded(x, getattr(torch, layout.dtype))


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator).double()


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).double()
