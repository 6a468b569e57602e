"""How the process of a tool ends."""

import os
import signal
import time

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner

import warm
from mmvssm.checkpoints import CheckpointError
from mmvssm.engine import UsageError, run_tool
from mmvssm.engine.launching import tool


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK', 'MMVSSM_DEBUG'):
        monkeypatch.delenv(name, raising=False)


def end(capsys, error):
    """Exit code and words of a tool that raises this, or does it."""

    def main():
        if callable(error):
            error()
        raise error

    with pytest.raises(SystemExit) as stop:
        run_tool(main)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize('kind', [UsageError, CheckpointError])
def test_a_mistake_is_one_message(capsys, kind):
    assert end(capsys, kind('no data.')) == (2, 'error: no data.\n')


@pytest.mark.parametrize(
    'error, said',
    [
        (RuntimeError('shapes differ\nmore\nand more'), 'RuntimeError: shapes differ'),
        (KeyError('img'), 'KeyError: img'),
        (ValueError('x' * 9000), f'ValueError: {"x" * 500}'),
        (
            torch.OutOfMemoryError('CUDA out of memory.'),
            'memory. Take fewer or smaller',
        ),
        (
            OSError(
                'Caught OSError in DataLoader worker process 0.\nOriginal Traceback '
                '(most recent call last):\n  File "a.py"\n    x\nOSError: a.png\n'
            ),
            'OSError: OSError: a.png',
        ),
    ],
)
def test_anything_else_is_one_sentence(capsys, error, said):
    code, words = end(capsys, error)
    assert code == 1 and said in words and 'MMVSSM_DEBUG=1 shows where' in words
    assert words.startswith('error: ') and words.count('\n') == 1
    assert 'Traceback' not in words and 'Original' not in words


def test_an_error_without_a_word_shows_its_line(capsys):
    def main():
        raise AssertionError

    code, words = end(capsys, main)
    assert code == 1 and 'AssertionError: raise AssertionError (' in words


@pytest.mark.parametrize('error', [UsageError('no data.'), RuntimeError('oh')])
def test_debug_shows_the_traceback(capsys, monkeypatch, error):
    monkeypatch.setenv('MMVSSM_DEBUG', '1')
    words = end(capsys, error)[1]
    assert words.startswith('Traceback') and 'in main\n' in words
    assert words.splitlines()[-1].startswith('error: ')


def test_a_mistake_of_the_config_is_the_users(capsys):
    def main():
        cfg = Config(dict(model=dict(backbone=dict(type='mmvssm.VSSM', depht=3))))
        MODELS.build(cfg.model.backbone)

    code, words = end(capsys, main)
    assert code == 2
    assert words.startswith("error: model.backbone: mmvssm.VSSM takes no 'depht'. It ")


@pytest.mark.parametrize('rank', ['', '3'])
def test_the_traceback_is_beside_the_log(capsys, monkeypatch, tmp_path, rank):
    monkeypatch.setenv('RANK', rank)
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    # A traceback has the runner in one of its frames.
    runner = object.__new__(Runner)
    runner._log_dir = str(tmp_path / 'work' / 'time')

    def main():
        running = runner
        raise RuntimeError(f'oh {type(running).__name__}')

    code, words = end(capsys, main)
    name = 'error_rank3.txt' if rank else 'error.txt'
    file = tmp_path / 'work' / 'time' / name
    assert code == 1 and f'the traceback is in {file};' in words
    text = file.read_text()
    assert text.startswith('Traceback') and text.endswith('RuntimeError: oh Runner\n')


def test_ctrl_c_says_nothing(capsys):
    assert end(capsys, KeyboardInterrupt()) == (130, '')


def test_another_rank_waits_for_the_first(capsys, monkeypatch):
    waited = []
    monkeypatch.setattr(time, 'sleep', waited.append)
    monkeypatch.setenv('RANK', '2')
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert end(capsys, UsageError('mine.')) == (2, 'error (rank 2): mine.\n')
    finally:
        signal.signal(signal.SIGTERM, before)
    assert waited == [tool._SECONDS_TO_BE_ENDED]


def test_a_launcher_that_ends_it_ends_its_words(tmp_path):
    """As torchrun does to all ranks when rank 0 has ended."""
    code = (
        'import signal, pathlib\n'
        'from mmvssm.engine import run_tool, UsageError\n'
        'signal.signal(signal.SIGTERM, lambda *_: None)\n'
        'def main():\n'
        "    pathlib.Path('there').touch()\n"
        "    raise UsageError('the same')\n"
        'run_tool(main)\n'
    )
    process = warm.start(
        ['-c', code],
        tmp_path / 'out',
        tmp_path / 'err',
        cwd=tmp_path,
        env={**os.environ, 'RANK': '1'},
    )
    while not (tmp_path / 'there').exists():
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(tool._SECONDS_TO_BE_ENDED - 3) != 0
    assert (tmp_path / 'err').read_text() == ''
