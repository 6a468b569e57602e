"""A new op is a declaration, a definition and a public function: here in one file."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from compare import relative_error
from mmvssm import ops
from mmvssm.ops.contract import Call, Flops
from mmvssm.ops.operator import Op, all_ops, public_ops


class DecayInputs(NamedTuple):
    """A sequence (B, L) and how much of it is kept from place to place (B,)."""

    x: Tensor
    rate: Tensor


class DecayOptions(NamedTuple):
    """How often."""

    times: int


DECAY = Op(
    'decay_for_a_test',
    DecayInputs,
    DecayOptions,
    returns=('y',),
    outputs_like=lambda inputs, options: (torch.empty_like(inputs.x),),
    flops=lambda shapes, options: [Flops(options.times * shapes.x[0] * shapes.x[1])],
)


class Definition(ops.Composed):
    """x times rate, again and again."""

    supplier = ops.backends.REFERENCE

    def forward(self, inputs, options, keep):
        x, rate = inputs
        for _ in range(options.times):
            x = x * rate[:, None]
        return ops.Result((x,))


class Power(ops.KernelBackend):
    """The same at once."""

    supplier = ops.backends.TORCH

    def forward(self, inputs, options, keep):
        x, rate = inputs
        return ops.Result((x * rate[:, None] ** options.times,))

    def backward(self, inputs, options, saved, grads, wanted):
        x, rate = inputs
        power = rate[:, None] ** (options.times - 1)
        by_rate = (options.times * power * x * grads[0]).sum(1)
        return DecayInputs(grads[0] * power * rate[:, None], by_rate)


DECAY.supply(Power(), Definition(), composed=lambda name: Power())


def _first(outputs: tuple[Tensor, ...], options: DecayOptions) -> Tensor:
    return outputs[0]


@DECAY.public(finish=_first)
def decay(x: Tensor, rate: Tensor, times: int = 3, *, backend=None) -> Call:
    """Let a sequence decay."""
    return Call(DecayInputs(x, rate), DecayOptions(times), backend)


@pytest.fixture(scope='module', autouse=True)
def leave_no_trace():
    """Other tests go through all ops there are."""
    yield
    all_ops.pop('decay_for_a_test', None)
    public_ops.pop(decay, None)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    x, rate = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((4, 7), (4,))
    )
    return x.requires_grad_(), rate.requires_grad_()


def test_numbers_gradients_and_gradients_of_these(inputs):
    def run(backend):
        y = decay(*inputs, backend=backend)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        loss = sum(g.square().sum() for g in first)
        return [y, *first, *torch.autograd.grad(loss, inputs)]

    for got, want in zip(run('torch'), run('reference')):
        assert relative_error(got, want) < 1e-12


def test_what_torch_wants_of_an_op(inputs):
    opcheck(DECAY.torch_op, (*inputs, 3, True, 'torch'))
    torch._dynamo.reset()
    compiled = torch.compile(decay, fullgraph=True, backend='aot_eager')
    assert relative_error(compiled(*inputs, backend='torch'), decay(*inputs)) < 1e-12
    with FlopCounterMode(display=False) as counter:
        decay(*inputs)
    assert counter.get_total_flops() == 2 * 3 * 4 * 7


def test_tangents_and_vmap(inputs):
    x, rate = (t.detach() for t in inputs)
    _, tangent = torch.func.jvp(decay, (x, rate), (torch.ones_like(x), 0 * rate))
    assert relative_error(tangent, (rate**3)[:, None].expand(4, 7)) < 1e-12
    together = torch.func.vmap(decay, (0, None))(torch.stack([x, 2 * x]), rate)
    assert relative_error(together[1], decay(2 * x, rate)) < 1e-12


def test_nan_is_named(inputs):
    x, rate = (t.detach().clone() for t in inputs)
    rate[1] = float('nan')
    with pytest.raises(ValueError, match='1 of 4 values of rate are NaN'):
        decay(x, rate)


def test_public_function_looks_like_one():
    assert decay.__doc__ == 'Let a sequence decay.' and decay.__name__ == 'decay'
    assert decay.__signature__.return_annotation is Tensor
