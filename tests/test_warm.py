"""Forks that stand for processes of their own: they are like these."""

import os
import signal
import subprocess
import sys

import pytest

import warm

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='forks on Linux only')

SCRIPT = """
import atexit, os, sys
atexit.register(print, 'the end')
print(__name__, sys.argv[1:], os.getcwd(), 'GONE' in os.environ, os.environ['NEW'])
print('to stderr', file=sys.stderr)
import beside, on_path
sys.exit(sys.argv[1] if sys.argv[1:] else 3)
"""


def real(command, **options):
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, **options
    )


@pytest.mark.parametrize('words', [(), ('said to the user',)])
def test_script_runs_as_in_a_real_process(words, tmp_path, monkeypatch):
    for folder in ('scripts', 'path', 'work'):
        (tmp_path / folder).mkdir()
    script = tmp_path / 'scripts/script.py'
    script.write_text(SCRIPT)
    (tmp_path / 'scripts/beside.py').touch()
    (tmp_path / 'path/on_path.py').touch()
    monkeypatch.setenv('GONE', '1')
    env = {key: value for key, value in os.environ.items() if key != 'GONE'}
    env.update(NEW='new', PYTHONPATH=str(tmp_path / 'path'))
    options = dict(cwd=tmp_path / 'work', env=env)
    done, wanted = (f([script, *words], **options) for f in (warm.run, real))
    assert done.stdout == wanted.stdout and 'the end' in done.stdout
    assert done.stderr == wanted.stderr
    assert done.returncode == wanted.returncode == (1 if words else 3)


def test_exception_and_signal():
    done = warm.run(['-c', '1 / 0'])
    assert done.returncode == 1
    assert done.stderr.startswith('Traceback (most recent call last):\n')
    assert done.stderr.endswith('ZeroDivisionError: division by zero\n')
    done = warm.run(['-c', 'import os; os.kill(os.getpid(), 15)'])
    assert done.returncode == -signal.SIGTERM


def test_order_of_merged_output():
    code = 'import sys; print(1, file=sys.stderr); print(2, flush=True); 1 / 0'
    assert warm.run(['-c', code], merge=True).stdout.startswith('1\n2\nTraceback')


def test_forks_draw_numbers_of_their_own_and_have_threads_as_asked():
    code = (
        'import random, numpy, torch\n'
        'print(random.random(), numpy.random.rand(), torch.get_num_threads())'
    )
    env = dict(os.environ, OMP_NUM_THREADS='2')
    first, second = (warm.run(['-c', code], env=env).stdout.split() for _ in range(2))
    assert first[0] != second[0] and first[1] != second[1]
    assert first[2] == second[2] == '2'


def test_nothing_outlives_the_time_limit(tmp_path):
    code = (
        'import subprocess, sys\n'
        "child = subprocess.Popen(['sleep', '1000'])\n"
        "open('pid', 'w').write(str(child.pid))\n"
        'child.wait()'
    )
    with pytest.raises(subprocess.TimeoutExpired):
        warm.run(['-c', code], cwd=tmp_path, timeout=3)
    pid = (tmp_path / 'pid').read_text()
    state = subprocess.run(['ps', '-o', 'stat=', pid], capture_output=True, text=True)
    assert state.stdout.strip()[:1] in ('', 'Z')
    assert warm.run(['-c', 'print(1)']).stdout == '1\n'


@pytest.mark.parametrize(
    ('name', 'forked'),
    [('MMVSSM_X', True), ('PYTHONHASHSEED', False)],
)
def test_what_is_read_at_the_start_gets_a_real_process(name, forked):
    code = "import sys; print('torch' in sys.modules)"
    done = warm.run(['-c', code], env=dict(os.environ, **{name: '7'}))
    assert done.stdout == f'{forked}\n'
