"""Without Slurm; tests/slurm has it.

The tests that fork come first: those behind them leave threads in this process.
"""

import multiprocessing
import os
import socket

import pytest
import torch
import torch.distributed as dist
from mmengine.dist import init_dist

from mmvssm.engine import UsageError
from mmvssm.engine.launching.slurm import set_mpi_rendezvous, set_rendezvous

# Of this run of the tests alone; and the next job with the same ports.
JOB = 40_000 + os.getpid() % 1000
SAME_PORTS = JOB + 1000
# The ports of a job: on the first half its tasks ask, on the second they meet.
DOOR = 15_000 + JOB % 1000 * 16


def in_step(monkeypatch, job=JOB, task=0, tasks=2, step=0):
    for name in ('MASTER_PORT', 'SLURM_RESTART_COUNT'):
        # For monkeypatch to restore what set_rendezvous writes.
        monkeypatch.setenv(name, '')
        monkeypatch.delenv(name)
    monkeypatch.setenv('MASTER_ADDR', '127.0.0.1')
    for name, value in dict(
        JOB_ID=job, STEP_ID=step, PROCID=task, NTASKS=tasks, NODELIST='n[1-2]'
    ).items():
        monkeypatch.setenv(f'SLURM_{name}', str(value))


def meet(job, task, step, results):
    """One task: the port, and the sum of all tasks' numbers.

    They join as on nodes with GPUs, by mmengine's launcher, but without a GPU.
    """
    with pytest.MonkeyPatch.context() as patch:
        in_step(patch, job, task, step=step)
        patch.setenv('SLURM_LOCALID', '0')
        patch.setattr(torch.cuda, 'set_device', lambda number: None)
        set_rendezvous(60)
        init_dist('slurm', 'gloo')
        number = torch.tensor(job * (1 + task))
        dist.all_reduce(number)
        dist.destroy_process_group()
        results.put((job, step, int(os.environ['MASTER_PORT']), int(number)))


def test_steps_on_one_node_meet_on_ports_of_their_own():
    context = multiprocessing.get_context('fork')
    results = context.Queue()
    # Services that say nothing, where the tasks of JOB meet first.
    with (
        socket.create_server(('127.0.0.1', DOOR)),
        socket.create_server(('127.0.0.1', DOOR + 8)),
    ):
        tasks = [
            context.Process(target=meet, args=(job, task, step, results))
            for job, step in ((JOB, 0), (JOB, 1), (SAME_PORTS, 0), (JOB + 1, 0))
            for task in (1, 0)
        ]
        for task in tasks:
            task.start()
        found = sorted(results.get(timeout=100) for _ in tasks)
        for task in tasks:
            task.join()
    assert all(job * 3 == total for job, _, _, total in found)
    steps = {(job, step): port for job, step, port, _ in found}
    assert len(set(found)) == len(steps) == len(set(steps.values())) == 4
    assert steps.pop((JOB + 1, 0)) not in range(DOOR, DOOR + 16)
    assert all(port in range(DOOR + 9, DOOR + 16) for port in steps.values())


def in_mpirun(monkeypatch, run, rank=0, size=2, here=2):
    for name in ('MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.setenv(name, '')
        monkeypatch.delenv(name)
    monkeypatch.setenv('PMIX_NAMESPACE', run)
    for name, value in dict(RANK=rank, SIZE=size, LOCAL_SIZE=here).items():
        monkeypatch.setenv(f'OMPI_COMM_WORLD_{name}', str(value))


def meet_in_mpirun(run, rank, results):
    with pytest.MonkeyPatch.context() as patch:
        in_mpirun(patch, run, rank)
        set_mpi_rendezvous(60)
        dist.init_process_group('gloo', rank=rank, world_size=2)
        number = torch.tensor(1 + rank)
        dist.all_reduce(number)
        dist.destroy_process_group()
        results.put((run, int(os.environ['MASTER_PORT']), int(number)))


def test_runs_of_mpirun_on_one_machine_meet_on_ports_of_their_own():
    context = multiprocessing.get_context('fork')
    results = context.Queue()
    runs = [f'prterun-host-{os.getpid()}@{i}' for i in range(2)]
    processes = [
        context.Process(target=meet_in_mpirun, args=(run, rank, results))
        for run in runs
        for rank in (1, 0)
    ]
    for process in processes:
        process.start()
    found = {results.get(timeout=100) for _ in processes}
    for process in processes:
        process.join()
    assert {run for run, _, _ in found} == set(runs)
    assert [total for _, _, total in found] == [3, 3]
    assert len({port for _, port, _ in found} - {29500}) == 2


def test_what_is_set_stays(monkeypatch):
    in_step(monkeypatch, task=1)
    monkeypatch.setenv('MASTER_PORT', '1234')
    set_rendezvous()
    assert (os.environ['MASTER_ADDR'], os.environ['MASTER_PORT']) == (
        '127.0.0.1',
        '1234',
    )


@pytest.mark.parametrize(('task', 'said'), [(0, 'only 0 of 1'), (1, 'did not answer')])
def test_tasks_that_wait_in_vain_say_so(task, said, monkeypatch):
    in_step(monkeypatch, task=task)
    with pytest.raises(UsageError, match=f'{said}.*MASTER_ADDR'):
        set_rendezvous(0.3)


def test_all_ports_taken(monkeypatch):
    in_step(monkeypatch)
    taken = [socket.create_server(('', DOOR + i)) for i in range(8)]
    try:
        with pytest.raises(UsageError, match='all in use.*MASTER_PORT'):
            set_rendezvous(10)
    finally:
        for server in taken:
            server.close()


@pytest.mark.parametrize('name', ['localhost', 'n1.invalid'])
def test_address_is_that_of_the_first_node(name, monkeypatch, tmp_path):
    in_step(monkeypatch)
    monkeypatch.delenv('MASTER_ADDR')
    monkeypatch.setenv('MASTER_PORT', '1')
    scontrol = tmp_path / 'scontrol'
    scontrol.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f'"show hostnames n[1-2]") echo {name}; echo n2;;\n'
        f'*"show node {name}") echo "NodeName={name} NodeAddr=10.0.0.7 OS=A B";;\n'
        'esac\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    set_rendezvous()
    expected = 'localhost' if name == 'localhost' else '10.0.0.7'
    assert os.environ['MASTER_ADDR'] == expected


def test_without_scontrol_the_address_must_be_given(monkeypatch, tmp_path):
    in_step(monkeypatch)
    monkeypatch.delenv('MASTER_ADDR')
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(UsageError, match='export MASTER_ADDR'):
        set_rendezvous()


def test_mpirun_on_several_machines_needs_an_address(monkeypatch):
    in_mpirun(monkeypatch, 'run', here=1)
    with pytest.raises(UsageError, match='MASTER_ADDR is not set.*rank 0'):
        set_mpi_rendezvous()
