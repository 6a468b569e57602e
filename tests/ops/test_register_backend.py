"""A backend that somebody else adds, by one call; and ones that compute wrongly."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from mmvssm import ops
from mmvssm.ops.leaves import leaves_of, pack
from mmvssm.ops.operator import all_ops, public_ops

from .ops_under_test import SMALL, case_name
from .test_all_ops import assert_right, truth

every_op = pytest.mark.parametrize('make', list(SMALL), ids=case_name)
TOY = ops.Supplier('toy', 'for this test')


@dataclass
class Toy:
    """Computes by the op's definition; ``spoil`` may do something to what it gives."""

    op: Any
    supplier: ops.Supplier = TOY
    differentiable: bool = False
    spoil: Any = lambda where, tensors: tensors
    passes: list = field(default_factory=list)

    def refuses(self, inputs, options):
        return None

    def saved_like(self, inputs, options):
        return ()

    def forward(self, inputs, options, keep):
        self.passes.append('forward')
        like = self.op.outputs_like(inputs, options)
        computed = self.op.backends['reference'].forward(inputs, options, False).outputs
        outputs = [x.copy_(y) for x, y in zip(like, computed)]
        return ops.Result(tuple(self.spoil('outputs', outputs)))

    def backward(self, inputs, options, saved, grads, wanted):
        self.passes.append('backward')
        leaves = leaves_of(inputs)
        reference = self.op.backends['reference']

        def outputs(*there):
            there = iter(there)
            filled = (None if x is None else next(there) for x in leaves)
            given = pack(type(inputs), filled)
            computed = reference.forward(given, options, False).outputs
            return tuple(y for y, grad in zip(computed, grads) if grad is not None)

        # Inside an op of torch.library torch's usual autograd is off.
        computed, pull_back = torch.func.vjp(
            outputs, *(x for x in leaves if x is not None)
        )
        grads = [grad for grad in grads if grad is not None]
        found = pull_back(tuple(g.to(y.dtype) for g, y in zip(grads, computed)))
        found = iter(self.spoil('gradients', list(found)))
        by_leaf = (None if x is None else next(found) for x in leaves)
        return pack(type(inputs), by_leaf)


@pytest.fixture
def register():
    """Registers backends for one test."""
    added = []

    def add(make, **options):
        backend = Toy(all_ops[make.__name__], **options)
        added.append(ops.register_backend(make.__name__, backend))
        return backend

    yield add
    for registration in added:
        registration.remove()


@every_op
def test_one_call_is_enough(register, make):
    """It is listed, explained and chosen, and passes the common test."""
    toy = register(make)
    assert ops.list_backends()[0] == 'toy'
    assert ops.backend_status()['toy'] is None
    assert ops.backend_summary('toy') == 'for this test'
    among = [*ops.backend_status()]
    found = ops.explain_backend('cpu', torch.float64, among=among)
    assert found['toy'].startswith('chosen')
    case = make(*SMALL[make])
    assert_right(case, 'toy', truth(make), 1e-10)
    assert toy.passes == ['forward', 'backward']
    with ops.use_backend('toy'):
        case.run()
    # Nobody asks for it by name, and it is the first that takes the tensors.
    case.run()
    assert toy.passes == 3 * ['forward', 'backward']
    with pytest.raises(ops.BackendUnavailableError, match='it takes float32'):
        narrow = ops.Supplier('narrow', 'for this test', dtypes=(torch.float32,))
        register(make, supplier=narrow)
        case.run('narrow')


@every_op
def test_it_goes_as_it_came(make):
    before = ops.list_backends()
    op = all_ops[make.__name__]
    ops.register_backend(make.__name__, Toy(op)).remove()
    assert ops.list_backends() == before and 'toy' not in op.backends


def wrong_gradient(where, tensors):
    if where == 'gradients':
        tensors[0] = 1.01 * tensors[0]
    return tensors


def nan(where, tensors):
    if where == 'gradients':
        tensors[0] = tensors[0].contiguous().clone()
        tensors[0].view(-1)[-1] = float('nan')
    return tensors


def wrong_stride(where, tensors):
    if where == 'outputs':
        axes = tuple(reversed(range(tensors[0].ndim)))
        tensors[0] = tensors[0].permute(axes).contiguous().permute(axes)
        if tensors[0].is_contiguous():
            tensors[0] = tensors[0].mT.contiguous().mT
    return tensors


@pytest.mark.parametrize('spoil', [wrong_gradient, nan, wrong_stride])
@every_op
def test_a_wrong_one_fails_the_common_test(register, make, spoil):
    register(make, spoil=spoil)
    with pytest.raises(AssertionError):
        assert_right(make(*SMALL[make]), 'toy', truth(make), 1e-10)


def test_what_cannot_be_registered(register):
    with pytest.raises(ValueError, match="'convolution' is no op of mmvssm; there are"):
        ops.register_backend('convolution', Toy(None))
    scan = public_ops[ops.selective_scan]
    second = Toy(scan, scan.backends['torch'].supplier)
    with pytest.raises(ValueError, match="selective_scan has a backend 'torch' alr"):
        ops.register_backend(ops.selective_scan, second)
