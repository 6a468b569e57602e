"""Calls without values: recorded, written down, changed, made again."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmvssm import ops
from mmvssm.ops.gpu_check import measure, values
from mmvssm.ops.gpu_check.calls import Layout, OpCall, Recorder, digest
from mmvssm.ops.gpu_check.cases import everything, of_calls
from mmvssm.ops.gpu_check.values import DISTINCT, Values, empty

from ..scan_inputs import scan_inputs, ss2d_inputs


def record(call):
    with Recorder() as recorder:
        call()
    return recorder.calls


@pytest.fixture
def scan():
    inputs = scan_inputs(5, 6, 7, 3, 2, dtype=torch.bfloat16, channels_last=True)
    (call,) = record(lambda: ops.selective_scan(**inputs, return_last_state=True))
    return call


def test_a_call_is_written_down_and_not_computed(scan, monkeypatch):
    assert scan.op == 'selective_scan' and scan.states == 3
    assert scan.named()['u'] == Layout((5, 6, 7), (42, 1, 6), 'bfloat16')
    assert dict(scan.options)['return_last_state'] is True
    assert 'u bf16[5, 6, 7]' in scan.text() and 'delta_softplus=False' in scan.text()
    # Nothing can compute it.
    monkeypatch.setattr(scan.declaration, 'backends', {})
    inputs = scan_inputs(1, 2, 3, 4)
    out, last = None, None

    def call():
        nonlocal out, last
        out, last = ops.selective_scan(**inputs, return_last_state=True)

    record(call)
    assert out.shape == (1, 2, 3) and last.shape == (1, 2, 4)


def test_the_same_call_is_counted():
    inputs = ss2d_inputs(1, 4, 3, 5, 2, 1, dtype=torch.float32)
    other = ss2d_inputs(1, 4, 3, 6, 2, 1, dtype=torch.float32)

    def model():
        for _ in range(3):
            assert ops.ss2d_scan(**inputs).shape == (1, 4, 3, 5)
        ops.ss2d_scan(**other)

    assert [call.count for call in record(model)] == [3, 1]


def test_fake_tensors_will_do():
    with FakeTensorMode():
        inputs = {
            name: torch.empty_like(x)
            for name, x in scan_inputs(2, 6, 7, 3, dtype=torch.float32).items()
        }
        (call,) = record(lambda: ops.selective_scan(**inputs))
    (real,) = record(
        lambda: ops.selective_scan(**scan_inputs(2, 6, 7, 3, dtype=torch.float32))
    )
    assert call == real


def test_json_keeps_everything(scan):
    for call in [scan, *(case.call for case in everything())]:
        assert OpCall.from_json(json.loads(json.dumps(call.as_json()))) == call


@pytest.mark.parametrize(
    'orders,word',
    [
        ('cross', 'cross'),
        ('hilbert', 'hilbert'),
        (['cross', 'zigzag'], 'shuffled 8'),
        (lambda h, w: [range(h * w), range(h * w)[::-1]], 'shuffled 2'),
    ],
)
def test_scan_orders_that_another_process_does_not_know(orders, word):
    """It gets others with as many rows."""
    sets = ops.scan_orders.count_orders(orders, 1, 1)
    inputs = dict(
        ss2d_inputs(1, 4, 3, 5, 2, 1, dtype=torch.float32),
        x_proj_weight=torch.ones(sets, 4, 4),
        dt_projs_weight=torch.ones(sets, 4, 2),
        dt_projs_bias=torch.ones(sets, 4),
        A=-torch.ones(sets * 4, 1),
        Ds=torch.ones(sets * 4),
    )
    (call,) = record(lambda: ops.ss2d_scan(**inputs, orders=orders))
    assert dict(call.options)['orders'] == word
    assert measure.fault(call, 'torch', torch.device('cpu'), 0) is None


def test_digest_is_of_a_set(scan):
    other = scan.longer()
    assert digest([scan, other]) == digest([other, scan])
    assert digest([scan]) != digest([other])


@pytest.mark.parametrize(
    'shape,stride,axis,want',
    [
        ((2, 3, 5), (15, 5, 1), 2, (18, 6, 1)),
        ((2, 3, 5), (15, 1, 3), 2, (18, 1, 3)),
        # A view of some columns.
        ((2, 3, 5), (40, 1, 8), 2, (48, 1, 8)),
        ((2, 3, 5), (15, 5, 1), 0, (15, 5, 1)),
        # Shared by the whole batch.
        ((2, 3, 5), (0, 5, 1), 2, (0, 6, 1)),
    ],
)
def test_a_longer_axis_keeps_the_order_in_memory(shape, stride, axis, want):
    longer = Layout(shape, stride, 'float32').resized(axis, shape[axis] + 1)
    assert longer.shape[axis] == shape[axis] + 1 and longer.stride == want


def test_other_calls_like_it(scan):
    longer = scan.longer().named()
    assert longer['u'].shape == (5, 6, 8) and longer['B'].shape == (5, 2, 3, 8)
    assert longer['A'] == scan.named()['A']
    exact = scan.with_dtype('float32')
    assert {x.dtype for x in exact.named().values()} == {'float32'}
    assert dict(exact.options)['out_dtype'] == 'float32'
    assert scan.with_batch(2).batch() == 2 and scan.batch() == 5
    assert [case.timed for case in of_calls([scan])] == [True, False, False, False]
    assert len(of_calls([exact])) == 2


def test_large_images_are_fewer(scan, monkeypatch):
    """In float64 they would not fit."""
    monkeypatch.setattr(values, '_VALUES', 6 * 7)
    assert len(Values.of(scan, torch.device('cpu')).counts()) == 1
    monkeypatch.setattr(values, '_VALUES', 2 * 6 * 7)
    assert len(Values.of(scan, torch.device('cpu')).counts()) == 2


def test_values_fill_the_whole_batch(scan):
    """With few distinct elements, each of which comes, and in no period."""
    scan = scan.with_batch(64)
    made = Values.of(scan, torch.device('cpu'))
    tensors = [None if x is None else empty(x, 'cpu') for x in scan.tensors]
    made.fill(tensors)
    assert len(made.counts()) == DISTINCT and min(made.counts()) > 0
    assert all(made.places[s:] != made.places[:-s] for s in range(1, 9))
    for name, x, few in zip(scan.declaration.labels, tensors, made.few):
        rows = few[made.places] if few.shape[0] == DISTINCT else few
        assert torch.equal(x.double(), rows), name
    assert len(torch.stack(list(made.few[0])).unique(dim=0)) == DISTINCT
