"""Which backend is used by default, by the verdicts of the check."""

import dataclasses
import threading
import time
import warnings

import pytest
import torch

from mmvssm import ops
from mmvssm.ops import backends
from mmvssm.ops.gpu_check import choice, run
from mmvssm.ops.gpu_check.verdicts import Store, Verdict, machine, standing

from ..backends_under_test import skips
from ..scan_inputs import scan_inputs, ss2d_inputs

CPU = torch.device('cpu')
pytestmark = list(skips('cpu'))
PASSED = Verdict(cases=3, milliseconds=dict(cuda=1.0, torch=4.0, mamba_ssm=2.0))
FAILED = Verdict(failure='selective_scan(u ...): the gradient of u has an error')
SLOWER = Verdict(cases=3, milliseconds=dict(cuda=5.0, torch=4.0, mamba_ssm=2.0))


@pytest.fixture(autouse=True)
def sound(kernels_stand_in):
    """Kernels that take tensors on the CPU, and are checked first."""


@pytest.fixture
def mamba_ssm(monkeypatch):
    """The package, as if it were for the CPU."""
    there = dataclasses.replace(
        backends.MAMBA_SSM, devices=('cpu',), unavailable=lambda: None
    )
    monkeypatch.setitem(backends.suppliers, 'mamba_ssm', there)


@pytest.fixture
def checks(monkeypatch):
    """What the check would find; how often it was run."""
    found = []

    def check(cases, backend, device, **kwargs):
        found.append({case.call.op for case in cases})
        return dict.fromkeys(found[-1], checks.verdict)

    def checks(verdict):
        checks.verdict = verdict
        return found

    monkeypatch.setattr(run, 'check', check)
    return checks


def taken(**options):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return ops.choose_backend('cpu', torch.float32, **options)


def explained(**options):
    return ops.explain_backend('cpu', torch.float32, **options)


def test_kernels_that_passed_are_taken(checks, mamba_ssm):
    runs = checks(PASSED)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert ops.choose_backend('cpu', torch.float32) == 'cuda'
        assert ops.choose_backend('cpu', torch.bfloat16) == 'cuda'
    assert runs == [{'selective_scan'}]
    # Each op has its own.
    assert taken(op='ss2d_scan') == 'cuda'
    assert runs == [{'selective_scan'}, {'ss2d_scan'}]
    assert '3 calls are right, 2.0 times as fast as mamba_ssm' in explained()['cuda']
    # What they do not take is not theirs.
    assert ops.choose_backend('cpu', torch.float64) == 'torch'


def test_the_next_one_is_taken_in_the_place_of_broken_ones(checks, mamba_ssm):
    checks(FAILED)
    with pytest.warns(UserWarning) as caught:
        assert ops.choose_backend('cpu', torch.float32) == 'mamba_ssm'
        assert ops.choose_backend('cpu', torch.bfloat16) == 'mamba_ssm'
    (warning,) = caught
    for text in (
        "selective_scan uses the backend 'mamba_ssm'. The backend 'cuda' is not used",
        'the gradient of u has an error',
        'report it with the output of `python -m mmvssm.check_gpu --all --json`',
    ):
        assert text in str(warning.message)
    assert explained()['cuda'].startswith('not used: its check failed on this machine')
    assert explained()['mamba_ssm'] == ('chosen: the first usable backend in this list')
    torch.use_deterministic_algorithms(True)
    assert taken() == 'torch'
    torch.use_deterministic_algorithms(False)
    # It knows no gradient of the last state.
    assert taken(last_state=True) == 'torch'
    assert explained(last_state=True)['mamba_ssm'] == 'used only when named'


def test_right_ones_that_are_slower_are_not_taken(checks, mamba_ssm):
    checks(SLOWER)
    assert taken() == 'mamba_ssm'
    assert 'mamba_ssm is faster on this machine' in explained()['cuda']


def test_what_counts_is_the_one_that_would_be_taken(checks, mamba_ssm):
    checks(Verdict(milliseconds=dict(cuda=3.0, torch=4.0, mamba_ssm=2.0)))
    assert taken() == 'mamba_ssm'
    torch.use_deterministic_algorithms(True)
    assert taken() == 'cuda'
    torch.use_deterministic_algorithms(False)


def test_asked_by_name_they_need_no_check(checks):
    runs = checks(FAILED)
    inputs = scan_inputs(1, 2, 3, 4, dtype=torch.float32)
    ops.selective_scan(**inputs, backend='cuda')
    with ops.use_backend('cuda'):
        assert taken() == 'cuda'
    assert not runs


@pytest.mark.parametrize('value,name', [('0', 'torch'), ('trust', 'cuda')])
def test_switch(checks, monkeypatch, value, name):
    runs = checks(FAILED if value == 'trust' else PASSED)
    monkeypatch.setenv('MMVSSM_GPU_CHECK', value)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert ops.choose_backend('cpu', torch.float32) == name
    assert explained()[name].startswith('chosen') and not runs
    assert f'MMVSSM_GPU_CHECK={value}' in explained()['cuda']
    monkeypatch.delenv('MMVSSM_GPU_CHECK')
    assert taken() == ('torch' if value == 'trust' else 'cuda')


def test_explaining_runs_no_check(checks):
    runs = checks(PASSED)
    found = explained()
    assert 'not checked on this machine yet' in found['cuda']
    assert 'python -m mmvssm.check_gpu' in found['cuda'] and not runs
    assert found['torch'].startswith('chosen')
    taken()
    assert explained()['cuda'].startswith('chosen: checked on this machine')


def test_an_op_without_kernels_needs_no_check(checks):
    runs = checks(PASSED)
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ops.linear(x, weight)
    assert not runs


def test_never_while_a_graph_is_captured(checks, monkeypatch):
    runs = checks(PASSED)
    monkeypatch.setattr(choice, '_capturing', lambda device: True)
    with pytest.warns(UserWarning, match='not checked on this machine yet'):
        assert ops.choose_backend('cpu', torch.float32) == 'torch'
    assert not runs
    # What is known counts.
    Store(CPU).add('selective_scan', {'selective_scan': PASSED})
    assert taken() == 'cuda' and not runs


def test_settled_before_torch_compile_traces(checks):
    """The graph has the kernels, not what was taken before they were checked."""
    runs = checks(PASSED)
    inputs = scan_inputs(1, 2, 3, 4, dtype=torch.float32)
    seen = []

    def keep(graph, example_inputs):
        seen.append(graph.print_readable(print_output=False))
        return graph

    torch._dynamo.reset()
    scan = torch.compile(
        lambda: ops.selective_scan(**inputs), fullgraph=True, backend=keep
    )
    out = scan()
    assert runs == [{'selective_scan'}] and "'cuda'" in seen[0]
    assert torch.equal(out, ops.selective_scan(**inputs, backend='cuda'))
    torch._dynamo.reset()


def test_every_call_takes_what_was_found(checks):
    """Through the whole of the op, with its gradient."""
    inputs = scan_inputs(1, 2, 3, 4, dtype=torch.float32)
    passes = []
    stand_in = ops.operator.all_ops['selective_scan'].backends['cuda']
    with pytest.MonkeyPatch.context() as patch:
        backward = stand_in.backward

        def seen(*arguments):
            passes.append('backward')
            return backward(*arguments)

        patch.setattr(stand_in, 'backward', seen)
        checks(PASSED)
        ops.selective_scan(**inputs).sum().backward()
        choice.forget()
        Store(CPU).forget()
        checks(FAILED)
        with pytest.warns(UserWarning, match="uses the backend 'torch'"):
            ops.selective_scan(**inputs).sum().backward()
    assert passes == ['backward']


def test_ops_say_what_they_are_asked(checks, mamba_ssm):
    """Their name, and whether somebody wants the last state."""
    runs = checks(FAILED)
    with (
        pytest.warns(UserWarning, match="ss2d_scan uses the backend 'mamba_ssm'"),
        pytest.raises(ImportError, match='mamba_ssm is not installed'),
    ):
        ops.ss2d_scan(**ss2d_inputs(1, 4, 3, 5, 2, 1, dtype=torch.float32))
    assert runs == [{'ss2d_scan'}]
    inputs = scan_inputs(1, 2, 3, 4, dtype=torch.float32)
    with pytest.warns(UserWarning, match="selective_scan uses the backend 'torch'"):
        _, last = ops.selective_scan(**inputs, return_last_state=True)
    last.sum().backward()
    assert inputs['A'].grad is not None


# What is kept


def test_store_keeps_sets(monkeypatch):
    store = Store(CPU)
    assert store.read() == {}
    store.add('one', {'selective_scan': PASSED})
    store.add('two', {'ss2d_scan': FAILED})
    assert store.read() == {
        'one': {'selective_scan': PASSED},
        'two': {'ss2d_scan': FAILED},
    }
    store.path.write_text('{"sets": {"one": {"selective_scan": {"unknown": 1}}}}')
    assert store.read() == {}
    store.path.write_text('half a fi')
    assert store.read() == {}
    store.forget()
    store.forget()


def test_another_machine_has_other_verdicts(monkeypatch):
    Store(CPU).add('one', {'selective_scan': PASSED})
    monkeypatch.setattr(torch, '__version__', '99.0')
    assert Store(CPU).read() == {}


def test_what_a_verdict_depends_on(monkeypatch):
    class Gpu:
        name, major, minor = 'A GPU', 9, 0

    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: Gpu)
    found = machine(torch.device('cuda', 1))
    assert found['device'] == 'A GPU' and found['capability'] == '9.0'
    assert {'torch', 'sources', 'driver', 'cuda', 'compiler'} <= set(found)


def test_one_failure_is_enough():
    """In whichever set; else the first set that there is counts."""
    sets = dict(own=dict(op=PASSED), all=dict(op=SLOWER), model=dict(other=FAILED))
    assert standing(sets, 'op', ['own', 'all']) is PASSED
    assert standing(sets, 'op', ['all', 'own']) is SLOWER
    assert standing(sets, 'op', ['model']) is None
    sets['model']['op'] = FAILED
    assert standing(sets, 'op', ['own', 'all']) is FAILED
    # Nor does it say anything that another check could not be made.
    unmade = dataclasses.replace(FAILED, certain=False, checked=time.time())
    sets['model']['op'] = unmade
    assert standing(sets, 'op', ['model', 'own']) is PASSED
    assert standing(sets, 'op', ['model']) is unmade


def test_what_may_pass_by_itself_is_looked_at_again(monkeypatch):
    store = Store(CPU)
    now = dataclasses.replace(FAILED, checked=time.time())
    store.add('one', {'op': dataclasses.replace(now, certain=False)})
    store.add('two', {'op': now})
    assert set(store.read()) == {'one', 'two'}
    later = time.time() + 3600
    monkeypatch.setattr(time, 'time', lambda: later)
    assert set(store.read()) == {'two'}


def test_one_process_at_a_time(checks):
    """The others wait, and find the verdict."""
    runs = checks(PASSED)
    store, order = Store(CPU), []

    def other():
        order.append('asks')
        run.ensure('one', lambda: run_cases(), CPU, 'cuda')
        order.append('has it')

    def run_cases():
        from mmvssm.ops.gpu_check.cases import of_op

        return of_op('selective_scan', small=True)

    with store.lock():
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.3)
        assert order == ['asks'] and not runs
        store.add('one', {'selective_scan': PASSED})
    thread.join()
    assert order == ['asks', 'has it'] and not runs
