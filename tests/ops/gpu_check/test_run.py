"""The process that checks: whatever it finds or whichever way it ends, a verdict."""

import pytest
import torch

from mmvssm.ops.gpu_check import run
from mmvssm.ops.gpu_check.cases import of_op
from mmvssm.ops.gpu_check.run import Limits, check, ensure, estimate
from mmvssm.ops.gpu_check.verdicts import Store, Verdict

from ..backends_under_test import skips

CPU = torch.device('cpu')
pytestmark = list(skips('cpu'))


def few(*ops, number=1):
    return [
        case._replace(timed=i == 0)
        for op in ops
        for i, case in enumerate(of_op(op, small=True)[:number])
    ]


@pytest.fixture(autouse=True)
def sound(kernels_stand_in):
    """What is chosen among is what the process chooses among."""


def test_sound_kernels():
    verdicts = check(few('selective_scan', 'ss2d_scan', number=2), 'cuda', 'cpu')
    for op in ('selective_scan', 'ss2d_scan'):
        verdict = verdicts[op]
        assert verdict.failure is None and verdict.cases == 2
        assert set(verdict.milliseconds) == {'cuda', 'torch'}
        assert min(verdict.milliseconds.values()) > 0
        assert '2 calls are right' in verdict.praise('cuda', 'torch')


def test_a_crash_is_of_one_op():
    """What comes after is looked at all the same, in another process."""
    cases = few('selective_scan', 'ss2d_scan')
    verdicts = check(cases, 'cuda', 'cpu', fault='crash')
    for op, verdict in verdicts.items():
        assert verdict.failure.startswith(f'{op}(') and verdict.certain
        assert verdict.failure.endswith('the process died of SIGSEGV')
        assert verdict.cases == 0 and not verdict.milliseconds


def test_out_of_time():
    """What was done in time counts, what was not may be another time."""
    cases = [*few('selective_scan'), *few('ss2d_scan', number=4)]
    verdicts = check(cases, 'cuda', 'cpu', fault='slow', limits=Limits(total=1.0))
    assert verdicts['ss2d_scan'].failure == 'not finished within 1 s'
    assert not verdicts['ss2d_scan'].certain


def test_a_process_that_does_not_start(monkeypatch):
    monkeypatch.setattr(run, 'WORKER', 'mmvssm.no_such_module')
    (verdict,) = check(few('selective_scan'), 'cuda', 'cpu').values()
    assert verdict.failure.startswith('the check did not start: the process ended')
    assert 'No module named' in verdict.failure and not verdict.certain


def test_a_process_that_never_starts(monkeypatch, tmp_path):
    (tmp_path / 'sleeps.py').write_text('import time\ntime.sleep(60)')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(run, 'WORKER', 'sleeps')
    limits = Limits(start=1.0)
    (verdict,) = check(few('selective_scan'), 'cuda', 'cpu', limits=limits).values()
    assert 'did not start: it did not end within 1 s' in verdict.failure


def test_once_for_a_machine(monkeypatch, caplog):
    """The second time the verdict is read; how long it takes is said before."""
    calls = []

    def cases_of():
        calls.append(None)
        return few('selective_scan')

    def again():
        return ensure('a set', cases_of, CPU, 'cuda')

    first = again()
    for text in ('1 calls of selective_scan, about', 'MMVSSM_GPU_CHECK=0'):
        assert text in caplog.text
    monkeypatch.setattr(run, 'check', None)
    assert again() == first and len(calls) == 1
    assert first['a set']['selective_scan'].cases == 1


def test_a_verdict_that_cannot_be_kept_counts_all_the_same(monkeypatch, caplog):
    def refuse(self, name, verdicts):
        raise OSError('disk full')

    monkeypatch.setattr(Store, 'add', refuse)
    sound = {'selective_scan': Verdict(cases=1)}
    monkeypatch.setattr(run, 'check', lambda *args, **kwargs: sound)
    found = ensure('a set', lambda: few('selective_scan'), CPU, 'cuda')
    assert found == {'a set': sound}
    assert 'cannot be kept: disk full' in caplog.text


def test_estimate_grows_with_the_calls():
    cases = of_op('selective_scan')
    assert estimate(cases[:2]) < estimate(cases) < 60
