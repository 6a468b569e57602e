"""``python -m mmvssm.check_gpu``, with kernels for the CPU, sound and broken."""

import json

import pytest
import torch

from mmvssm import check_gpu, ops
from mmvssm.ops.gpu_check import choice, stand_in
from mmvssm.ops.gpu_check.verdicts import Store, Verdict

from ..backends_under_test import on

ONE_OP = ['--device', 'cpu', '--ops', 'selective_scan']
# What each fault is called in the end.
SAID = dict(
    wrong='the gradient of u has an error of',
    nan='1 of 3570 values of the gradient of u are not finite',
    hang='it did not end within 2 s',
    crash='the process died of SIGSEGV',
    slow='its results are right, but torch is faster on this machine',
)


def test_without_a_gpu(capsys):
    assert check_gpu.main([]) == 0
    assert 'nothing to check: torch' in capsys.readouterr().out
    assert check_gpu.main(['--json', '--all']) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['ops'] == {} and 'CUDA' in found['reason']


@pytest.mark.parametrize('backend', [on('cpu')])
def test_sound_kernels_are_taken(capsys, backend):
    assert check_gpu.main(ONE_OP) == 0
    out, err = capsys.readouterr()
    assert 'selective_scan: cuda is used by default' in out
    assert '8 calls are right' in out and '8 calls to check, in about' in err
    # On the CPU it is a show.
    assert Store(torch.device('cpu')).read() == {}


@pytest.mark.parametrize('backend', [on('cpu')])
@pytest.mark.parametrize('fault', stand_in.FAULTS)
def test_broken_kernels_are_not(capsys, fault, backend):
    """Verdict, message, and what is taken in their place."""
    limit = ['--limit', '2'] if fault == 'hang' else []
    assert check_gpu.main([*ONE_OP, '--fault', fault, '--json', *limit]) == 1
    found = json.loads(capsys.readouterr().out)['ops']['selective_scan']
    assert found['backend'] == 'torch'
    (warning,) = found['warnings']
    assert 'the kernels of selective_scan are not used, torch is' in warning
    assert SAID[fault] in warning and SAID[fault] in found['why']
    assert 'Please report it' in warning
    assert (found['failure'] is None) == (fault == 'slow')
    assert ops.choose_backend('cpu', torch.float32) == 'torch'


def test_what_was_found_before_is_forgotten(monkeypatch, kernels_stand_in):
    """And what is found is kept for calls to come."""
    device = torch.device('cpu')
    Store(device).add('of a config', {'selective_scan': Verdict(failure='wrong')})
    good = {'selective_scan': Verdict(cases=1)}
    lengths, totals = [], []

    def check(cases, *args, limits, **kwargs):
        lengths.append(len(cases))
        totals.append(limits.total)
        return good

    monkeypatch.setattr(check_gpu, 'check', check)
    kept = []
    monkeypatch.setattr(
        Store, 'add', lambda self, name, verdicts: kept.append((name, verdicts))
    )
    assert check_gpu.main(ONE_OP) == 0
    assert check_gpu.main([*ONE_OP, '--all']) == 0
    assert kept == [('selective_scan', good), ('all', good)]
    assert Store(device).read() == {} and lengths[0] < 10 < 100 < lengths[1]
    # All of it takes its time.
    assert totals[0] == 60 < totals[1]
    assert choice.explanation('cuda', 'selective_scan', 'cpu', None, 'torch')[0]


def test_faults_are_for_the_cpu(capsys):
    with pytest.raises(SystemExit):
        check_gpu.main(['--fault', 'wrong'])
    assert '--fault is for --device cpu' in capsys.readouterr().err
