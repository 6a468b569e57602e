"""One training at a time in a work dir."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch.distributed as dist
from mmengine.config import Config

import warm
from mmvssm.engine import UsageError, lock_work_dir
from mmvssm.engine.launching import work_dir
from mmvssm.engine.launching.work_dir import LOCK, Owner, WorkDirLock
from tiny import REPO
from toy import environment, free_port, train_each, wait, write_toy

OUT = ('--work-dir', 'out', '--resume', 'auto')
linux = pytest.mark.skipif(sys.platform != 'linux', reason='asks /proc')


def leave_lock(folder, seconds_ago=0, **changes):
    """The lock of another training, of this process if nothing is changed."""
    owner = Owner.here()._replace(**changes)
    path = folder / LOCK
    path.write_text(json.dumps(owner._asdict()))
    renewed = time.time() - seconds_ago
    os.utime(path, (renewed, renewed))
    return path


def ended_process():
    process = subprocess.Popen(['true'])
    process.wait()
    return process.pid


def owner_in(folder):
    return work_dir._read(folder / LOCK)[0]


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_file_names_its_owner_and_goes_with_it(tmp_path):
    folder = tmp_path / 'new' / 'out'
    with WorkDirLock(folder) as lock:
        assert files(folder) == [LOCK]
        assert owner_in(folder) == lock.owner
        assert lock.owner.pid == os.getpid()
        with pytest.raises(UsageError) as refused:
            WorkDirLock(folder)
    (message,) = str(refused.value).splitlines()
    for part in (str(folder), f'process {os.getpid()}', lock.owner.host, '--work-dir'):
        assert part in message
    assert time.strftime('since %Y-%m-%d') in message
    # It is known to go on, so there is nothing to wait for.
    assert 'seconds' not in message
    assert files(folder) == []
    lock.release()
    WorkDirLock(folder).release()


def test_a_process_has_its_own_lock_twice(tmp_path):
    cfg = Config(dict(work_dir=str(tmp_path)))
    with lock_work_dir(cfg) as lock:
        assert lock_work_dir(cfg) is lock
    assert files(tmp_path) == []
    with lock_work_dir(Config(dict(work_dir='s3://bucket/out'))):
        pass


def test_ranks_join_as_the_runner_would_let_them(tmp_path, monkeypatch):
    joined = []
    monkeypatch.setattr(
        work_dir, 'init_dist', lambda *args, **kwargs: joined.append((args, kwargs))
    )
    cfg = Config(
        dict(
            work_dir=str(tmp_path),
            launcher='pytorch',
            env_cfg=dict(dist_cfg=dict(backend='nccl', timeout=9)),
        )
    )
    lock_work_dir(cfg).release()
    cfg.launcher = 'none'
    lock_work_dir(cfg).release()
    assert joined == [(('pytorch',), dict(backend='nccl', timeout=9))]


@pytest.mark.parametrize(
    'changes',
    [
        dict(pid=ended_process),
        # The number is another process's now.
        pytest.param(dict(start=1), marks=linux),
        dict(host='n2', job='c:7', restarts=2),
    ],
    ids=['no such process', 'another process', 'requeued job'],
)
def test_who_is_gone_stops_nobody(changes, tmp_path, monkeypatch):
    changes = {k: v() if callable(v) else v for k, v in changes.items()}
    leave_lock(tmp_path, **changes)
    monkeypatch.setenv('SLURM_CLUSTER_NAME', 'c')
    monkeypatch.setenv('SLURM_JOB_ID', '7')
    monkeypatch.setenv('SLURM_RESTART_COUNT', '3')
    with WorkDirLock(tmp_path) as lock:
        assert owner_in(tmp_path) == lock.owner
        assert files(tmp_path) == [LOCK]
    assert files(tmp_path) == []


@linux
def test_killed_process_that_nobody_waits_for_is_gone(tmp_path):
    process = subprocess.Popen(['sleep', '100'])
    try:
        start = work_dir._start_of(process.pid)
        leave_lock(tmp_path, pid=process.pid, start=start)
        with pytest.raises(UsageError, match=f'process {process.pid} '):
            WorkDirLock(tmp_path)
        process.kill()
        # Ended, and listed until the parent asks.
        wait(lambda: work_dir._start_of(process.pid) == -1)
        WorkDirLock(tmp_path).release()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    'changes',
    [
        dict(host='n2'),
        dict(machine='another boot 1'),
        # Another step of the same run of a job.
        dict(host='n2', job='c:7', restarts=3),
        dict(host='n2', job='other:7', restarts=0),
    ],
    ids=['another machine', 'container', 'step of the job', 'other cluster'],
)
def test_on_another_machine_two_minutes_decide(changes, tmp_path, monkeypatch):
    monkeypatch.setenv('SLURM_CLUSTER_NAME', 'c')
    monkeypatch.setenv('SLURM_JOB_ID', '7')
    monkeypatch.setenv('SLURM_RESTART_COUNT', '3')
    changes = dict(pid=ended_process(), **changes)
    leave_lock(tmp_path, 100, **changes)
    with pytest.raises(UsageError, match=r'again in (1\d|2[01]) seconds\.$'):
        WorkDirLock(tmp_path)
    path = leave_lock(tmp_path, 130, **changes)
    # The clock of the disk counts, not that of this machine.
    with monkeypatch.context() as patch:
        patch.setattr(time, 'time', lambda: 0.0)
        WorkDirLock(tmp_path).release()
    assert not path.exists()


@pytest.mark.parametrize('text', ['', '{"host": "n1"', '[]', '{"host": 1}'])
def test_lock_that_says_nothing_expires(text, tmp_path):
    (tmp_path / LOCK).write_text(text)
    with pytest.raises(UsageError, match='another training: .* again in 1[12]. sec'):
        WorkDirLock(tmp_path)
    os.utime(tmp_path / LOCK, (0, 0))
    WorkDirLock(tmp_path).release()


def test_renewing(tmp_path, monkeypatch):
    monkeypatch.setattr(work_dir, '_SECONDS_TO_RENEW', 0.01)
    with WorkDirLock(tmp_path) as lock:
        os.utime(tmp_path / LOCK, (0, 0))
        wait(lambda: (tmp_path / LOCK).stat().st_mtime > 0)
        # Somebody has tidied up.
        (tmp_path / LOCK).unlink()
        wait((tmp_path / LOCK).exists)
        wait(lambda: owner_in(tmp_path) == lock.owner)
    assert files(tmp_path) == []


def test_it_ends_where_another_has_taken_over(tmp_path, monkeypatch, capfd):
    codes = []
    monkeypatch.setattr(os, '_exit', codes.append)
    with WorkDirLock(tmp_path) as lock:
        leave_lock(tmp_path, host='n2', pid=5)
        lock.renew()
    assert codes == [2]
    assert 'process 5 on n2' in capfd.readouterr().err
    # It is the other's.
    assert owner_in(tmp_path).host == 'n2'


def test_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UsageError, match='cannot write to the work dir .*--work-dir'):
        WorkDirLock(tmp_path / 'file' / 'out')


def _race(folder, barrier, wins):
    barrier.wait()
    try:
        WorkDirLock(folder)
    except UsageError:
        pass
    else:
        with wins.get_lock():
            wins.value += 1
    barrier.wait()


@pytest.mark.parametrize('stale', [False, True])
def test_of_several_at_once_one_gets_it(stale, tmp_path):
    context = multiprocessing.get_context('fork')
    for number in range(4):
        folder = tmp_path / str(number)
        folder.mkdir()
        if stale:
            leave_lock(folder, pid=ended_process())
        barrier, wins = context.Barrier(4), context.Value('i', 0)
        arguments = (folder, barrier, wins)
        racers = [context.Process(target=_race, args=arguments) for _ in range(4)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert wins.value == 1


def test_late_taker_puts_a_fresh_lock_back(tmp_path):
    leave_lock(tmp_path, pid=ended_process())
    stale = owner_in(tmp_path)
    with WorkDirLock(tmp_path) as lock:
        late = object.__new__(WorkDirLock)
        late.path, late.owner = tmp_path / LOCK, lock.owner._replace(pid=1)
        late._remove(stale)
        assert owner_in(tmp_path) == lock.owner
        assert files(tmp_path) == [LOCK]


def _rank(rank, port, folder, said):
    dist.init_process_group(
        'gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2
    )
    cfg = Config(dict(work_dir=str(folder), launcher='pytorch'))
    try:
        lock_work_dir(cfg)
    except UsageError as error:
        said.put(str(error))
    else:
        said.put('')
    dist.destroy_process_group()
    work_dir.release_work_dirs()


@pytest.mark.parametrize('taken', [False, True])
def test_all_ranks_hear_what_rank_0_finds(taken, tmp_path):
    if taken:
        leave_lock(tmp_path)
    context = multiprocessing.get_context('fork')
    said, port = context.Queue(), free_port()
    ranks = [
        context.Process(target=_rank, args=(rank, port, tmp_path, said))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    first, second = (said.get(timeout=60) for _ in ranks)
    for rank in ranks:
        rank.join()
    assert first == second
    assert bool(first) is taken
    assert f'process {os.getpid()} ' in first or not taken
    assert files(tmp_path) == ([LOCK] if taken else [])


@contextmanager
def held_training(folder):
    """A training that waits in its third iteration until it is told to stop."""
    log = folder / 'held.txt'
    log.touch()
    process = warm.start(
        [REPO / 'tools/train.py', 'toy_config.py', *OUT],
        *(log, log),
        cwd=folder,
        env={**os.environ, **environment('hold@3')},
    )
    try:
        wait(lambda: (folder / 'out/holds_0').exists() or 'Error' in log.read_text())
        yield process
    finally:
        warm.kill(process)


def test_second_training_in_a_work_dir_is_refused(tmp_path):
    write_toy(tmp_path, iters=5)
    with held_training(tmp_path) as process:
        before = files(tmp_path / 'out')
        assert LOCK in before
        ((code, log),) = train_each(tmp_path, ('', *OUT))
        (message,) = log.strip().splitlines()
        assert (code, message[:7]) == (2, 'error: ')
        assert f'process {process.pid} on' in message
        assert files(tmp_path / 'out') == before
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(300) == 75
    assert LOCK not in files(tmp_path / 'out')
    ((code, log),) = train_each(tmp_path, ('', *OUT))
    assert code == 0, log
    assert LOCK not in files(tmp_path / 'out')
