r"""Parameters and FLOPs of a model, the scan included.

The convention is that of the published tables (and of fvcore and mmengine):

- a multiply-add of a matrix product or a convolution is one FLOP;
- a norm costs 5 per element (4 without affine parameters), an evaluated
  batch norm 2 (1); bilinear resizing 4 per output, average pooling 1 per
  input; activations, additions, products of elements and copies are free;
- a selective scan over B sequences of L positions with D channels and N
  states costs

  .. math:: 9 B L D N + B D L \; [\text{skip}\ D] + B D L \; [\text{gate}\ z].

SS2D scans along K orders at once, by default four, so there D is K times its
inner channels, and its projections to Δ, B and C add the matrix products of their
definition, however a backend computes them:
:math:`K B L C (R + 2 N) + K B L C R`. What an order pads is not counted. The
bidirectional scan is two scans whose sum is gated once, with two convolutions of
width W and two sets of projections: :math:`2 B L C (W + R + 2 N) + 2 B L C R`.
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
from torch.utils.flop_counter import register_flop_formula

from mmvssm.ops import Direction, bidirectional_scan, ss2d_scan

aten = torch.ops.aten
SCAN = torch.ops.mmvssm.selective_scan
FUSED_SS2D = torch.ops.mmvssm.ss2d_scan
FUSED_BIDIRECTIONAL = torch.ops.mmvssm.bidirectional_scan
LINEAR = torch.ops.mmvssm.linear
ADD_NORM = torch.ops.mmvssm.add_rms_norm


@dataclass(frozen=True)
class Complexity:
    """What :func:`count_flops` counted.

    Attributes:
        params: Number of parameters.
        flops: FLOPs of one forward pass.
        by_operator: Those FLOPs by the name of the operator.
    """

    params: int
    flops: int
    by_operator: dict[str, int]


def scan_flops(
    batch: int,
    channels: int,
    length: int,
    states: int,
    skip: bool = True,
    gate: bool = False,
) -> int:
    """FLOPs of one selective scan, 9BLDN + BDL [skip] + BDL [gate]."""
    return batch * channels * length * (9 * states + skip + gate)


def count_flops(
    model: nn.Module, input_shape: Sequence[int] = (1, 3, 224, 224)
) -> Complexity:
    """Count the FLOPs of ``model(image)`` in eval mode, without computing it.

    Shapes are all that is propagated, so any size takes a few seconds and no
    memory. The model is left as it was, its mode included.

    Args:
        model: Takes one tensor. A segmentor of mmseg does, and returns the
            logits at the decode head's resolution; its auxiliary head then
            has parameters but runs no FLOPs.
        input_shape: Shape of that tensor, (batch, channels, height, width).

    Raises:
        NotImplementedError: The model runs an op of mmvssm that has no
            formula here.
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
            device = next(iter(state.values())).device if state else 'cpu'
            image = torch.empty(tuple(input_shape), device=device)
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
    """Adds up the ops that reach the dispatcher."""

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
    """Counts some ops as a whole and none of the ops they are made of."""

    def __init__(self, counter: _FlopCounter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in _WHOLE:
            return func(*args, **(kwargs or {}))
        self.counter.flops.update(_WHOLE[func](*args))
        self.counter.paused = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.counter.paused = False


def _ss2d_scan(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
) -> dict[str, int]:
    batch, channels, height, width = x.shape
    length, states = height * width, A.shape[1]
    weights = x_proj_weight.numel() + dt_projs_weight.numel()
    return {
        'ss2d_scan: projections': batch * length * weights,
        'ss2d_scan: scan': scan_flops(
            batch, len(x_proj_weight) * channels, length, states
        ),
    }


def _bidirectional_scan(
    x: Tensor, z: Tensor, forward: Direction, backward: Direction
) -> dict[str, int]:
    batch, channels, length = x.shape
    positions, ways = batch * length, (forward, backward)
    weights = sum(w.x_proj_weight.numel() + w.dt_proj_weight.numel() for w in ways)
    taps = sum(w.conv_weight.numel() for w in ways)
    scans = scan_flops(batch, 2 * channels, length, forward.A.shape[1])
    return {
        'bidirectional_scan: convolutions': positions * taps,
        'bidirectional_scan: projections': positions * weights,
        'bidirectional_scan: scans': scans + positions * channels,
    }


_WHOLE = {ss2d_scan: _ss2d_scan, bidirectional_scan: _bidirectional_scan}


def _product(first: int) -> Callable[[tuple, Tensor], int]:
    """A matrix product, whose left factor is argument number ``first``."""
    return lambda args, out: out.numel() * args[first].shape[-1]


def _convolution(args: tuple, out: Tensor) -> int:
    x, weight, transposed = args[0], args[1], args[6]
    pixels = (x if transposed else out).shape[2:]
    return out.shape[0] * weight.numel() * prod(pixels)


def _norm(weight: int, per_element: int) -> Callable[[tuple, Any], int]:
    """A norm whose affine weight is argument number ``weight``."""
    return lambda args, out: args[0].numel() * (per_element - (args[weight] is None))


def _scan(args: tuple, out: tuple[Tensor, ...]) -> int:
    u, _, A, _, _, D, z = args[:7]
    return scan_flops(*u.shape, A.shape[1], D is not None, z is not None)


def _fused_ss2d_flops(
    x: Sequence[int], dt_weight: Sequence[int], A: Sequence[int], multiply_add: int = 1
) -> int:
    """Of the op behind ss2d_scan, which x (B, H, W, C) enters projected."""
    batch, height, width, channels = x
    projection = batch * height * width * prod(dt_weight) * multiply_add
    return projection + scan_flops(batch, dt_weight[0] * channels, height * width, A[1])


def _fused_bidirectional_flops(
    x: Sequence[int], weights: Sequence[Sequence[int]], multiply_add: int = 1
) -> int:
    """Of the op behind bidirectional_scan, which x (B, L, D) enters."""
    batch, length, channels = x
    half = len(Direction._fields)
    ways = [Direction(*weights[:half]), Direction(*weights[half:])]
    matrices = ('conv_weight', 'x_proj_weight', 'dt_proj_weight')
    products = sum(prod(getattr(w, name)) for w in ways for name in matrices)
    scans = scan_flops(batch, 2 * channels, length, ways[0].A[1])
    return batch * length * (products * multiply_add + channels) + scans


# Each formula takes the positional arguments of the op and what it returned.
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
    SCAN: _scan,
    LINEAR: _product(0),
    # Counters of the published models do not see their RMS norms.
    ADD_NORM: lambda args, out: 0,
}


def _scan_handle(inputs: list, outputs: list) -> int:
    u, A = get_shape(inputs[0]), get_shape(inputs[2])
    skip, gate = (get_shape(inputs[i]) is not None for i in (5, 6))
    return scan_flops(*u, A[1], skip, gate)


def _fused_ss2d_handle(inputs: list, outputs: list) -> int:
    return _fused_ss2d_flops(*(get_shape(inputs[i]) for i in (0, 2, 4)))


def _fused_bidirectional_handle(inputs: list, outputs: list) -> int:
    weights = [get_shape(weight) for weight in inputs[2].node().inputs()]
    return _fused_bidirectional_flops(get_shape(inputs[0]), weights)


def _linear_handle(inputs: list, outputs: list) -> int:
    return prod(get_shape(inputs[0])) * get_shape(inputs[1])[0]


# For counters that trace a model, mmengine's and fvcore's:
# FlopAnalyzer(model, image).set_op_handle(**SCAN_HANDLES)
SCAN_HANDLES = {
    'mmvssm::selective_scan': _scan_handle,
    'mmvssm::ss2d_scan': _fused_ss2d_handle,
    'mmvssm::bidirectional_scan': _fused_bidirectional_handle,
    'mmvssm::linear': _linear_handle,
}


# torch.utils.flop_counter.FlopCounterMode, which counts a multiply-add of
# everything else as two, finds the scan once this module is imported.
@register_flop_formula(SCAN)
def _(u, delta, A, B, C, D=None, z=None, *args, out_shape=None, **kwargs):
    return scan_flops(*u, A[1], D is not None, z is not None)


@register_flop_formula(FUSED_SS2D)
def _(x, projected, dt_weight, dt_bias, A, *args, out_shape=None, **kwargs):
    return _fused_ss2d_flops(x, dt_weight, A, multiply_add=2)


@register_flop_formula(FUSED_BIDIRECTIONAL)
def _(x, z, weights, *args, out_shape=None, **kwargs):
    return _fused_bidirectional_flops(x, weights, multiply_add=2)


@register_flop_formula(LINEAR)
def _(x, weight, *args, out_shape=None, **kwargs):
    return 2 * prod(x) * weight[0]
