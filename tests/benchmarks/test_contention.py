"""contention.py: who runs when, and what is made of the times."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import warm
from mmvssm.engine import UsageError
from tiny import REPO

# Answers with the time that its setting names.
WORKER = """
import json, os, sys, time
task = json.loads(sys.stdin.readline())
print(json.dumps(dict(threads=1)), flush=True)
while not task or task['forever']: time.sleep(1)
for line in sys.stdin:
    seconds = [float(os.environ['TIME'])] * json.loads(line)['steps']
    print(json.dumps(dict(seconds=seconds)), flush=True)
"""


@pytest.fixture
def contention(load, monkeypatch):
    if sys.platform == 'win32':
        pytest.skip('no process can be stopped there')
    return load('contention')


@pytest.fixture
def workers(contention, monkeypatch, tmp_path):
    """Stand-ins, as quick as they are small; which ones run at once is noted."""
    path = tmp_path / 'worker.py'
    path.write_text(WORKER)
    monkeypatch.setattr(contention, 'WORKER', path)
    monkeypatch.setattr(
        contention, 'ENVIRONMENT', {**contention.ENVIRONMENT, 'TIME': '3'}
    )
    return path


def test_settings_are_environments(contention, monkeypatch):
    monkeypatch.setattr(contention, 'ENVIRONMENT', {'PATH': 'p', 'A': '0'})
    environment = contention.environment
    assert environment('default') == {'PATH': 'p', 'A': '0'}
    assert environment('passive')['OMP_WAIT_POLICY'] == 'PASSIVE'
    assert environment('A=1,B=x=y') == {'PATH': 'p', 'A': '1', 'B': 'x=y'}
    assert environment('A=')['A'] == ''
    for wrong in ('fast', '', 'A=1,B', '=1'):
        with pytest.raises(UsageError, match=f"'{wrong}' is no setting"):
            environment(wrong)


@pytest.mark.parametrize(
    'arguments', [['--steps', '0'], ['--hogs', '-1'], ['--hogs', '0'], ['--block', '0']]
)
def test_nothing_to_measure_is_refused(contention, arguments, capsys):
    with pytest.raises(SystemExit) as end:
        contention.parse_args(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert 'at least' in error or 'leaves nothing' in error


def test_blocks_take_turns(contention, workers, monkeypatch):
    turns = []

    class Noted(contention.Training):
        def steps(self, count):
            turns.append((self.setting, len(now) - 1, count))
            return super().steps(count)

    now = []
    running = contention.running

    @contention.contextmanager
    def noting(processes):
        now[:] = processes
        with running(processes):
            yield

    monkeypatch.setattr(contention, 'Training', Noted)
    monkeypatch.setattr(contention, 'running', noting)
    options = ['--hogs', '2', '--twin', '--steps', '5', '--block', '3']
    args = contention.parse_args([*options, '--settings', 'default', 'TIME=4'])
    first, second = contention.measure(args)
    # Alone, with two hogs and with a twin; in the second round the other way round.
    assert turns == [
        (setting, others, 3)
        for order in ((0, 2, 1), (1, 2, 0))
        for setting in ('default', 'TIME=4')
        for others in order
    ]
    times = dict(alone=[3.0] * 3, hogs=[3.0] * 3, twin=[3.0] * 3)
    assert first['rounds'] == [times, times]
    assert second['rounds'][0]['twin'] == [4.0] * 3


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_processes_stand_still_between_turns(contention):
    def state_becomes(wanted):
        stat = Path(f'/proc/{pid}/stat')
        for _ in range(1000):
            if stat.read_text().rpartition(')')[2].split()[0] in wanted:
                return True
            time.sleep(0.01)
        return False

    with contention.Hog() as hog:
        pid = hog._process.pid
        assert state_becomes('T')
        with contention.running([hog]):
            assert state_becomes('R')
        assert state_becomes('T')
        with pytest.raises(RuntimeError), contention.running([hog]):
            raise RuntimeError
        assert state_becomes('T')
    # A process that is stopped has to end, too.
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.skipif(sys.platform != 'linux', reason='prctl is of Linux')
def test_no_process_outlives_the_benchmark(contention):
    code = (
        'import os, contention; hog = contention.Hog(); '
        'print(hog._process.pid, flush=True); os.kill(os.getpid(), 9)'
    )
    env = {**os.environ, 'PYTHONPATH': str(REPO / 'benchmarks')}
    done = subprocess.run(
        [sys.executable, '-c', code], env=env, stdout=subprocess.PIPE, timeout=60
    )
    pid = int(done.stdout)
    stat = Path(f'/proc/{pid}/stat')
    for _ in range(1000):
        if not stat.exists() or ') Z ' in stat.read_text():
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    pytest.fail('the hog is still there')


def test_training_that_ends_is_one_sentence(contention, workers):
    workers.write_text('raise SystemExit(3)')
    args = contention.parse_args([])
    with pytest.raises(UsageError, match="setting 'default' ended with code 3"):
        contention.measure(args)


def test_ratios_by_hand(contention):
    def rounds(alone, hogs):
        pairs = zip(alone, hogs)
        return [dict(alone=[a, a, a], hogs=[h, h, 9.0]) for a, h in pairs]

    first, second = contention.summarise(
        [
            dict(setting='default', ready={}, rounds=rounds([1.0, 2.0], [3.0, 4.0])),
            dict(setting='passive', ready={}, rounds=rounds([2.0, 2.0], [3.0, 3.0])),
        ]
    )
    assert first['seconds'] == dict(alone=1.5, hogs=4.0) and first['steps'] == 6
    assert first['ratio'] == pytest.approx(4 / 1.5)
    assert first['ratio_of_rounds'] == [3.0, 2.0]
    assert first['alone_over_first'] == 1 and 'twin_ratio' not in first
    assert second['ratio'] == 1.5
    assert second['alone_over_first'] == pytest.approx(2 / 1.5)
    lines = contention.table([first, second], hogs=1).splitlines()
    assert ' '.join(lines[1].split()) == 'default 1500.0 1.000 2.67 (2.00 to 3.00) -'
    assert lines[2].split()[:3] == ['passive', '2000.0', '1.333']


def test_a_training_beside_a_hog(contention, tmp_path):
    pytest.importorskip('mmseg')
    out = tmp_path / 'new' / 'c.json'
    options = ['--steps', '1', '--block', '1', '--threads', '1', '--json', out]
    size = 'model.data_preprocessor.size=64,64'
    options += ['--cfg-options', 'train_dataloader.batch_size=2', size]
    done = warm.run([REPO / 'benchmarks/contention.py', *options], timeout=300)
    assert done.returncode == 0, done.stderr
    assert f'written to {out}' in done.stdout
    result = json.loads(out.read_text())
    (setting,) = result['settings']
    assert setting['ready']['threads'] == 1 and setting['steps'] == 1
    seconds = setting['seconds']
    assert result['ratio'] == pytest.approx(seconds['hogs'] / seconds['alone'])
    assert result['environment']['Machine']['CPU'] and result['hogs'] == 1
