r"""Parameters and FLOPs of a model, including its scans.

This uses the convention of the published tables (and of fvcore and mmengine):

- a multiply-add of a matrix product or a convolution is one FLOP;
- a norm costs 5 for each element (4 without affine parameters), a batch norm in eval
  mode 2 (1); bilinear resizing 4 for each output, average pooling 1 for each input;
  activations, additions, elementwise products and copies are free;
- a selective scan over B sequences of L positions with D channels and N
  states costs

  .. math:: 9 B L D N + B D L \; [\text{skip}\ D] + B D L \; [\text{gate}\ z].

SS2D has K scans, by default four. So there D is K times its inner channels. Its
projections to Δ, B and C add the matrix products of their definition, however a backend
computes them: :math:`K B L C (R + 2 N) + K B L C R`. Padded places are not counted. The
bidirectional scan is two scans whose sum is gated once, with two convolutions of width
W
and two sets of projections: :math:`2 B L C (W + R + 2 N) + 2 B L C R`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from mmengine.analysis.jit_handles import get_shape
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmvssm.backbones import set_img_shapes
from mmvssm.ops.leaves import shapes_of
from mmvssm.ops.operator import Op, all_ops, public_ops
from mmvssm.ops.selective_scan.declaration import scan_flops

__all__ = [
    'DISPATCH_HANDLES',
    'SCAN_HANDLES',
    'Complexity',
    'count_flops',
    'scan_flops',
]

aten = torch.ops.aten


@dataclass(frozen=True)
class Complexity:
    """The result of :func:`count_flops`.

    Attributes:
        params: Number of parameters.
        flops: FLOPs of one forward pass.
        by_operator: These FLOPs by the name of the operator.
    """

    params: int
    flops: int
    by_operator: dict[str, int]


def count_flops(
    model: nn.Module, input_shape: Sequence[int] = (1, 3, 224, 224)
) -> Complexity:
    """Count the FLOPs of ``model(image)`` in eval mode, without computing it.

    Only shapes are computed, so any size takes a few seconds and no memory. The model,
    including its mode, does not change.

    Args:
        model: A model that takes one tensor. A segmentor of mmseg does, and returns the
            logits at the resolution of the decode head. Its auxiliary head has
            parameters but does not run.
        input_shape: Shape of that tensor, (batch, channels, height, width).

    Raises:
        NotImplementedError: The model runs an op of mmvssm without a formula here.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        counter = _FlopCounter()
        with FakeTensorMode() as fake, torch.no_grad():
            state = {
                name: fake.from_tensor(tensor)
                for name, tensor in (*model.named_parameters(), *model.named_buffers())
            }
            floats = [x for x in state.values() if x.is_floating_point()]
            like = floats[0] if floats else torch.empty(0)
            image = like.new_empty(tuple(input_shape))
            set_img_shapes(image, [input_shape[2:]] * input_shape[0])
            with counter, _WholeOps(counter):
                functional_call(model, state, (image,))
    finally:
        for module, training in modes.items():
            module.training = training
    return Complexity(
        sum(p.numel() for p in model.parameters()),
        counter.flops.total(),
        dict(counter.flops),
    )


class _FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of the ops that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.flops = Counter()
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        op = func.overloadpacket
        if self.paused:
            pass
        elif op in FORMULAS:
            name = op._qualified_op_name.split('::')[1]
            self.flops[name] += FORMULAS[op](args, out)
        elif func.namespace == 'mmvssm':
            raise NotImplementedError(
                f'{func} has no formula in mmvssm.analysis.flops.FORMULAS, '
                'and its FLOPs would be missing from the count'
            )
        return out


class _WholeOps(TorchFunctionMode):
    """Counts each op of mmvssm as a whole, without the ops that it is composed of."""

    def __init__(self, counter: _FlopCounter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in public_ops or self.counter.paused:
            return func(*args, **kwargs)
        op = public_ops[func]
        call = func.__wrapped__(*args, **kwargs)
        for part in op.flops(shapes_of(call.inputs), call.options):
            name = f'{op.name}: {part.part}' if part.part else op.name
            self.counter.flops[name] += part.products + part.others
        self.counter.paused = True
        try:
            return func(*args, **kwargs)
        finally:
            self.counter.paused = False


def _product(first: int) -> Callable[[tuple, Tensor], int]:
    """A matrix product; its left factor is argument number ``first``."""
    return lambda args, out: out.numel() * args[first].shape[-1]


def _convolution(args: tuple, out: Tensor) -> int:
    x, weight, transposed = args[0], args[1], args[6]
    pixels = (x if transposed else out).shape[2:]
    return out.shape[0] * weight.numel() * prod(pixels)


def _norm(weight: int, per_element: int) -> Callable[[tuple, Any], int]:
    """A norm; its affine weight is argument number ``weight``."""
    return lambda args, out: args[0].numel() * (per_element - (args[weight] is None))


# Each formula takes the positional arguments of the op and its result.
FORMULAS: dict[Any, Callable[[tuple, Any], int]] = {
    aten.mm: _product(0),
    aten.bmm: _product(0),
    aten.addmm: _product(1),
    aten.baddbmm: _product(1),
    aten.convolution: _convolution,
    aten.native_layer_norm: _norm(2, 5),
    aten.native_group_norm: _norm(1, 5),
    aten.native_batch_norm: _norm(1, 2),
    aten._native_batch_norm_legit_no_training: _norm(1, 2),
    aten.cudnn_batch_norm: _norm(1, 2),
    aten.upsample_bilinear2d: lambda args, out: 4 * out.numel(),
    aten._adaptive_avg_pool2d: lambda args, out: args[0].numel(),
}


def _handle(op: Op) -> Callable[[list, list], int]:
    """A formula for counters that trace a model, from values of its graph."""

    def count(inputs: list, outputs: list) -> int:
        shapes = [get_shape(x) for x in inputs[: len(op.names)]]
        values = [x.toIValue() for x in inputs[len(op.names) : -2]]
        return _cost(op, shapes, values)

    return count


def _dispatch_handle(op: Op) -> Callable[[Sequence, Any], int]:
    """A formula for counters that see the arguments of a call, and what it gave."""

    def count(args: Sequence, outputs: Any) -> int:
        tensors = args[: len(op.names)]
        shapes = [None if x is None else tuple(x.shape) for x in tensors]
        return _cost(op, shapes, args[len(op.names) : -2])

    return count


def _cost(op: Op, shapes: Sequence, options: Sequence) -> int:
    parts = op.flops(*op.pack(shapes, options))
    return sum(part.products + part.others for part in parts)


# For counters that trace a model, mmengine's and fvcore's:
# FlopAnalyzer(model, image).set_op_handle(**SCAN_HANDLES). torch's own,
# torch.utils.flop_counter.FlopCounterMode, knows the ops without that. docs/flops.md
# has what each counter needs.
SCAN_HANDLES = {f'mmvssm::{name}': _handle(op) for name, op in all_ops.items()}

# For counters that watch torch's dispatcher: custom_modules_hooks of ptflops, with its
# backend 'aten'. A multiply-add is one, as in SCAN_HANDLES.
DISPATCH_HANDLES = {
    getattr(torch.ops.mmvssm, name): _dispatch_handle(op)
    for name, op in all_ops.items()
}
