"""What dist_train.sh and dist_test.sh give to torch, and what they refuse."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tiny import REPO
from toy import free_port

TOOLS = REPO / 'tools'
ONE_MACHINE = ['--standalone', '--local_addr=127.0.0.1']


def call(tmp_path, script, *arguments, **environment):
    """A script with a Python that only says what it is to run."""
    python = tmp_path / 'python'
    python.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && exec python3 "$@"\nprintf "%s\\n" "$@"\n'
    )
    python.chmod(0o755)
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in ('PORT', 'NNODES', 'NODE_RANK', 'MASTER_ADDR')
    }
    return subprocess.run(
        [TOOLS / script, *arguments],
        env={**inherited, 'PYTHON': str(python), **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ('script', 'arguments', 'given'),
    [
        ('train', ['c.py', '8', '--amp'], ['c.py', '--launcher', 'pytorch', '--amp']),
        (
            'test',
            ['c.py', 'my file.pth', '8', '--tta'],
            ['c.py', 'my file.pth', '--launcher', 'pytorch', '--tta'],
        ),
        ('test', ['c.py', '8'], ['c.py', '--launcher', 'pytorch']),
    ],
)
def test_on_one_machine_torch_finds_a_port(script, arguments, given, tmp_path):
    done = call(tmp_path, f'dist_{script}.sh', *arguments)
    assert done.stdout.splitlines() == [
        *(str(TOOLS / 'torchrun.py'), *ONE_MACHINE, '--nproc_per_node=8'),
        *(str(TOOLS / f'{script}.py'), *given),
    ]


@pytest.mark.parametrize(
    ('environment', 'where'),
    [
        (dict(PORT='{free}'), ('1', '0', '127.0.0.1', '{free}')),
        (
            dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='host0'),
            ('2', '1', 'host0', '29500'),
        ),
        (
            dict(NNODES='2', MASTER_ADDR='host0', PORT='{free}'),
            ('2', '0', 'host0', '{free}'),
        ),
    ],
)
def test_what_is_given_is_taken(environment, where, tmp_path):
    free = free_port()
    environment = {key: value.format(free=free) for key, value in environment.items()}
    done = call(tmp_path, 'dist_train.sh', 'c.py', '4', **environment)
    names = ('nnodes', 'node_rank', 'master_addr', 'master_port')
    assert done.stdout.splitlines()[1:5] == [
        f'--{name}={value.format(free=free)}' for name, value in zip(names, where)
    ]


@pytest.mark.parametrize(
    ('environment', 'advice'),
    [({}, 'leave PORT out'), (dict(NNODES='2'), 'the same on all machines')],
)
def test_port_that_is_taken_is_one_sentence(environment, advice, tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = str(server.getsockname()[1])
        done = call(tmp_path, 'dist_train.sh', 'c.py', '2', PORT=port, **environment)
    assert (done.returncode, done.stdout) == (2, '')
    (message,) = done.stderr.splitlines()
    assert f'port {port} cannot be opened' in message and advice in message


@pytest.mark.parametrize(
    ('script', 'arguments', 'environment', 'said'),
    [
        ('train', ['c.py'], {}, 'usage: '),
        ('test', [], {}, 'usage: '),
        ('test', ['c.py', 'w.pth'], {}, 'usage: '),
        ('train', ['c.py', '--amp'], {}, "the number of processes is '--amp'"),
        ('test', ['c.py', 'w.pth', '0'], {}, "the number of processes is '0'"),
        ('train', ['c.py', '2'], dict(PORT='x'), 'port x cannot be opened'),
        (
            'train',
            ['c.py', '2'],
            dict(NNODES='2', NODE_RANK='1'),
            'without MASTER_ADDR',
        ),
    ],
)
def test_mistakes_are_one_sentence(script, arguments, environment, said, tmp_path):
    done = call(tmp_path, f'dist_{script}.sh', *arguments, **environment)
    assert (done.returncode, done.stdout) == (2, '')
    (message,) = done.stderr.splitlines()
    assert said in message


_RANKS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
if sys.argv[1] == 'wait':
    open(f'{sys.argv[2]}/{os.environ["RANK"]}', 'w').close()
elif os.environ['RANK'] == '1':
    sys.exit(int(sys.argv[1]))
time.sleep(60)
"""


@pytest.mark.parametrize('code', [2, 75])
def test_exit_code_of_the_first_that_failed(code, tmp_path):
    script = tmp_path / 'ranks.py'
    script.write_text(_RANKS)
    done = subprocess.run(
        [sys.executable, TOOLS / 'torchrun.py', *ONE_MACHINE, '--nproc_per_node=2']
        + [script, str(code)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert 'Traceback' not in done.stderr


def test_stopped_processes_are_to_be_started_again(tmp_path):
    script = tmp_path / 'ranks.py'
    script.write_text(_RANKS)
    process = subprocess.Popen(
        [sys.executable, TOOLS / 'torchrun.py', *ONE_MACHINE, '--nproc_per_node=2']
        + [script, 'wait', tmp_path],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not all((tmp_path / rank).exists() for rank in '01'):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and 'Traceback' not in said
