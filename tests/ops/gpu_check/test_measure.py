"""One call checked: what is right passes, and whatever is wrong is found."""

import itertools

import pytest
import torch

from mmvssm.ops import Result, backends
from mmvssm.ops.gpu_check import cases, launches, measure
from mmvssm.ops.gpu_check.cases import of_op, with_kernels
from mmvssm.ops.gpu_check.stand_in import StandIn
from mmvssm.ops.gpu_check.values import Values
from mmvssm.ops.operator import all_ops

from ..backends_under_test import skips

CPU = torch.device('cpu')
pytestmark = list(skips('cpu'))
OPS = ['selective_scan', 'ss2d_scan', 'bidirectional_scan', 'add_rms_norm']


def call_of(op, batch=8, dtype='float32'):
    case = of_op(op, small=True)[0]
    return case.call.with_batch(batch).with_dtype(dtype, ('float32',))


@pytest.mark.parametrize('op', [*OPS, 'linear_attention'])
@pytest.mark.parametrize('backend', ['cpu', 'torch'])
def test_right_ones_pass(op, backend):
    """At odd sizes, in float32 and bfloat16, and with many times the same image."""
    for case in of_op(op, small=True):
        call = case.call.with_batch(5)
        assert measure.fault(call, backend, CPU, repeats=1) is None, call.text()


def test_everything_is_a_call_that_the_ops_take():
    """Every length, dtype, scan order and option; a few of them are computed."""
    every = cases.everything(small=True)
    ops = {case.call.op for case in every}
    assert ops == {'linear_attention', *OPS}
    # What has kernels for a GPU is checked there.
    assert {op for op, known in all_ops.items() if 'cuda' in known.backends} <= ops
    assert 0 < len(with_kernels(every, 'mamba_ssm')) < len(every)
    lengths = {
        case.call.named()['u'].shape[2]
        for case in every
        if case.call.op == 'selective_scan'
    }
    assert lengths > {1, 15, 16, 17, 197, 600, 3137}
    for case in every[:: len(every) // 20]:
        if case.call.named().popitem()[1].places() < 50_000:
            assert measure.fault(case.call, 'torch', CPU, 0) is None, case.call.text()


@pytest.fixture
def spoiled(monkeypatch):
    """The backend ``cuda`` on the CPU, whose results a function may spoil."""

    def make(op, forward=None, backward=None):
        supplier = backends.Supplier('cuda', 'spoiled for this test')
        monkeypatch.setitem(backends.suppliers, 'cuda', supplier)

        class Spoiled(StandIn):
            def forward(self, *arguments):
                found = super().forward(*arguments)
                spoil = forward(found) if forward else None
                return found if spoil is None else spoil

            def backward(self, *arguments):
                found = super().backward(*arguments)
                spoil = backward(found) if backward else None
                return found if spoil is None else spoil

        known = all_ops[op]
        spoiled = Spoiled(known.backends['cpu'], supplier, None)
        monkeypatch.setitem(known.backends, 'cuda', spoiled)

    return make


@pytest.mark.parametrize('op', OPS)
def test_a_wrong_weight_gradient(spoiled, op):
    """Summed over the whole batch, of which few elements are computed exactly."""

    def forget_one(grads):
        name = 'weight' if op == 'add_rms_norm' else 'A'
        if op == 'bidirectional_scan':
            way = grads.backward._replace(A=grads.backward.A * (7 / 8))
            return grads._replace(backward=way)
        return grads._replace(**{name: getattr(grads, name) * (7 / 8)})

    spoiled(op, backward=forget_one)
    fault = measure.fault(call_of(op), 'cuda', CPU, repeats=0)
    assert 'the gradient of' in fault and 'at most 1.0e-05 is allowed' in fault


def test_an_element_of_the_batch_in_the_place_of_another(spoiled):
    def swap(found):
        out = found.outputs[0].clone()
        out[1:3] = found.outputs[0][[2, 1]]
        return Result((out, *found.outputs[1:]), found.saved)

    spoiled('selective_scan', forward=swap)
    call = call_of('selective_scan')
    assert Values.of(call, CPU).places[1:3] in ([0, 1], [1, 0], [0, 2], [2, 0])
    assert 'out has an error' in measure.fault(call, 'cuda', CPU, repeats=0)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_single_wrong_value(spoiled, dtype):
    """Beside many right ones it is nothing in the norm of all."""

    def add(found):
        found.outputs[0][3, 2, 1, 1] += found.outputs[0].abs().max()

    spoiled('ss2d_scan', forward=add)
    call = call_of('ss2d_scan', 50, dtype)
    assert 'y has an error' in measure.fault(call, 'cuda', CPU, repeats=0)


def test_nan(spoiled):
    def spoil(grads):
        grads.Ds[:2] = torch.nan

    spoiled('ss2d_scan', backward=spoil)
    fault = measure.fault(call_of('ss2d_scan'), 'cuda', CPU, repeats=0)
    assert '2 of 280 values of the gradient of Ds are not finite' in fault


def test_what_is_not_written(spoiled):
    """New memory is NaN."""

    def lazy(grads):
        return grads._replace(A=torch.empty_like(grads.A))

    spoiled('selective_scan', backward=lazy)
    fault = measure.fault(call_of('selective_scan'), 'cuda', CPU, repeats=0)
    assert 'the gradient of A are not finite' in fault


@pytest.mark.parametrize('place', [-1, 15])
def test_what_is_written_beside(spoiled, place):
    def beside(found):
        out = torch.empty(5, 3)
        step = torch.as_strided(out, (1,), (1,), out.storage_offset() + place)
        step.fill_(0)

    spoiled('selective_scan', forward=beside)
    fault = measure.fault(call_of('selective_scan'), 'cuda', CPU, repeats=0)
    assert fault == 'a kernel wrote outside of a float32 tensor (5, 3)'


def test_what_is_read_beside(spoiled):
    """There is NaN around every input."""

    def read(inputs):
        x = inputs.u
        return torch.as_strided(x, (1,), (1,), x.storage_offset() - 1)

    class Reads(StandIn):
        def forward(self, inputs, options, keep):
            found = super().forward(inputs, options, keep)
            found.outputs[0][0, 0, 0] += 0 * read(inputs)[0]
            return found

    known = all_ops['selective_scan']
    supplier = backends.Supplier('cuda', 'reads beside its input')
    with pytest.MonkeyPatch.context() as patch:
        reads = Reads(known.backends['torch'], supplier, None)
        patch.setitem(known.backends, 'cuda', reads)
        fault = measure.fault(call_of('selective_scan'), 'cuda', CPU, repeats=0)
    assert fault == '1 of 9520 values of out are not finite'


def test_other_bits_in_another_run(spoiled):
    count = itertools.count()

    def drift(grads):
        return grads._replace(u=grads.u * (1 + 2e-7 * (next(count) > 1)))

    spoiled('selective_scan', backward=drift)
    call = call_of('selective_scan')
    assert measure.fault(call, 'cuda', CPU, repeats=0) is None
    fault = measure.fault(call, 'cuda', CPU, repeats=3)
    assert fault == (
        'the gradient of u has different bits in a second run with the same inputs'
    )


def test_forward_without_gradients(spoiled):
    """Which other kernels may compute."""

    class Worse(StandIn):
        def forward(self, inputs, options, keep):
            found = super().forward(inputs, options, keep)
            if not keep:
                found.outputs[0].mul_(1.001)
            return found

    known = all_ops['selective_scan']
    supplier = backends.Supplier('cuda', 'worse without gradients')
    with pytest.MonkeyPatch.context() as patch:
        worse = Worse(known.backends['cpu'], supplier, None)
        patch.setitem(known.backends, 'cuda', worse)
        fault = measure.fault(call_of('selective_scan'), 'cuda', CPU, repeats=0)
    assert fault.startswith('out without gradients has an error of 1.0e-03')


def test_numbers_that_no_sum_has_exactly(spoiled, monkeypatch):
    """Where plain tensor code errs as well, kernels may err like it, but not more."""
    monkeypatch.setitem(measure._ALLOWED, 'float32', 1e-9)
    call = call_of('selective_scan')
    spoiled('selective_scan')
    assert measure.fault(call, 'cuda', CPU, repeats=0) is None

    def drift(grads):
        return grads._replace(u=grads.u * (1 + 3e-5))

    spoiled('selective_scan', backward=drift)
    assert 'the gradient of u has' in measure.fault(call, 'cuda', CPU, repeats=0)


@pytest.mark.parametrize('factor', [2, 1e4])
def test_what_cancels_out(monkeypatch, factor):
    """The only position has all of the attention: its query's gradient is noise."""
    shapes = {
        case.call: case.call.named()['q'].shape
        for case in of_op('linear_attention', small=True)
    }
    call = next(call for call, shape in shapes.items() if shape[1] == 1)
    known = all_ops['linear_attention'].backends

    class Noisy(StandIn):
        differentiable = True

        def forward(self, inputs, options, keep):
            q = inputs.q.detach()
            inputs = inputs._replace(q=q + factor * (inputs.q - q))
            return known['torch'].forward(inputs, options, keep)

    supplier = backends.Supplier('cuda', 'noisy')
    monkeypatch.setitem(known, 'cuda', Noisy(known['torch'], supplier, None))
    fault = measure.fault(call, 'cuda', CPU, repeats=0)
    assert (fault is None) == (factor == 2), fault


def test_time_is_that_of_both_passes(spoiled):
    spoiled('selective_scan')
    passes = []
    spoiled(
        'selective_scan',
        forward=lambda found: passes.append('forward'),
        backward=lambda grads: passes.append('backward'),
    )
    assert measure.milliseconds(call_of('selective_scan'), 'cuda', CPU, 3) > 0
    assert passes == ['forward', 'backward'] * 4


def test_launches_are_found_without_values(monkeypatch):
    """Forward and backward, and those without gradients."""
    from mmvssm.ops.cuda import kernels

    kernel = kernels.Kernel('toy.cu', 'toy')

    class Launches(StandIn):
        def forward(self, inputs, options, keep):
            self._launch(inputs.u, KEEP=keep)
            return Result(all_ops['selective_scan'].outputs_like(inputs, options))

        def backward(self, inputs, options, saved, grads, wanted):
            self._launch(inputs.u, BACKWARD=1)
            return inputs

        def _launch(self, x, **constants):
            kernel.launch(
                *(constants, None),
                grid=kernels.multiprocessors(x),
                threads=32,
                on=x,
            )

    supplier = backends.Supplier('cuda', 'launches')
    toy = Launches(all_ops['selective_scan'].backends['torch'], supplier, None)
    monkeypatch.setattr(toy, 'saved_like', lambda inputs, options: ())
    monkeypatch.setitem(all_ops['selective_scan'].backends, 'cuda', toy)
    call = call_of('selective_scan')
    found = launches.launches_of([call, call], multiprocessors=7)
    assert {launch.grid for launch in found} == {7}
    names = [dict(launch.constants) for launch in found]
    assert names == [{'KEEP': True}, {'BACKWARD': 1}, {'KEEP': False}]
    # An op that has none there.
    monkeypatch.delitem(all_ops['linear_attention'].backends, 'cuda')
    (without,) = launches.launches_of([], [call, call_of('linear_attention')])
    assert dict(without.constants) == {'KEEP': False}
