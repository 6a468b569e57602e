"""What the process that checks does on a GPU, without one."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from mmvssm.ops.cuda import kernels
from mmvssm.ops.gpu_check import launches, measure, worker
from mmvssm.ops.gpu_check.cases import of_op
from mmvssm.ops.gpu_check.tasks import MARK, Job, Task

SCAN, MAP = (of_op(op, small=True)[0].call for op in ('selective_scan', 'ss2d_scan'))


@pytest.fixture
def events(monkeypatch, capsys):
    """Run the process's function; what it tells."""
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    monkeypatch.setattr(launches, 'compile_for', lambda *calls: 0)
    monkeypatch.setattr(measure, 'fault', lambda *arguments: None)
    monkeypatch.setattr(measure, 'milliseconds', lambda *arguments: 1.5)

    def run(*tasks, training=(), inference=()):
        job = Job('cuda', 'cuda:0', None, list(tasks), list(training), list(inference))
        monkeypatch.setattr(sys, 'stdin', io.StringIO(json.dumps(job.as_json())))
        worker.main()
        lines = capsys.readouterr().out.splitlines()
        return [json.loads(line.removeprefix(MARK)) for line in lines]

    return run


def check(call=SCAN, backend='cuda', kind='check'):
    return Task(kind, backend, call)


def test_steps_in_order(events):
    found = events(check(), check(MAP), check(kind='time', backend='torch'))
    assert found == [
        dict(compiled=True),
        dict(begins=0),
        dict(ends=0, failure=None),
        dict(begins=1),
        dict(ends=1, failure=None),
        dict(begins=2),
        dict(ends=2, milliseconds=1.5),
    ]


def test_all_kernels_are_compiled_first(events, monkeypatch):
    """Those of the check, and those that the model needs at other sizes."""
    asked = []

    def compile_for(training, inference, device):
        asked.append((list(training), list(inference), str(device)))

    monkeypatch.setattr(launches, 'compile_for', compile_for)
    longer = SCAN.longer()
    events(check(), training=[longer], inference=[MAP])
    assert asked == [([SCAN, longer], [MAP], 'cuda:0')]


def test_kernels_are_compiled_for_the_gpu(monkeypatch):
    gpu = SimpleNamespace(major=9, minor=0, multi_processor_count=7)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: gpu)
    asked = []
    monkeypatch.setattr(
        launches, 'launches_of', lambda *arguments: asked.append(arguments) or ['one']
    )
    monkeypatch.setattr(
        kernels, 'prepare', lambda *arguments: asked.append(arguments) or 3
    )
    assert launches.compile_for([SCAN], [MAP], torch.device('cuda')) == 3
    assert asked == [([SCAN], [MAP], 7), (['one'], 90)]


def test_an_op_that_cannot_be_compiled(events, monkeypatch):
    """The others are checked."""

    def compile_for(training, inference, device):
        if any(call.op == 'ss2d_scan' for call in training):
            raise RuntimeError('no register left\nand more')

    monkeypatch.setattr(launches, 'compile_for', compile_for)
    found = events(check(), check(MAP), check(MAP))
    assert found[2] == dict(ends=0, failure=None)
    assert found[3:] == [
        dict(begins=1),
        dict(ends=1, failure='its kernels: no register left'),
    ]


def test_after_an_error_another_process_goes_on(events, monkeypatch):
    """CUDA's errors stay."""

    def broken(*arguments):
        raise RuntimeError('CUDA error: an illegal memory access')

    monkeypatch.setattr(measure, 'fault', broken)
    found = events(check(), check(MAP))
    assert found[-1] == dict(
        ends=0,
        failure='RuntimeError: CUDA error: an illegal memory access',
        broken=True,
    )


def test_a_lack_of_memory_may_pass(events, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(measure, 'fault', full)
    found = events(check(), check(), check(MAP))
    assert found[2] == dict(ends=0, failure='CUDA out of memory', certain=False)
    # Nothing more of that op.
    assert found[3] == dict(begins=2) and len(found) == 5


def test_a_rival_that_refuses_is_not_timed(events):
    found = events(check(kind='time', backend='mamba_ssm'), check())
    assert 'mamba_ssm is not installed' in found[2]['failure']
    assert found[-1] == dict(ends=1, failure=None)
