"""Tools say nothing that a user would take for a fault."""

import logging
import os
import re
import subprocess
import sys
import warnings

import pytest
from mmengine.logging import MMLogger

from mmvssm import compat
from mmvssm.engine.launching import quiet
from tiny import REPO, write_ade, write_config


def test_a_training_starts_without_noise(tmp_path):
    """A real process: a fork of tests/warm.py has imported mmseg before."""
    pytest.importorskip('mmseg')
    write_ade(tmp_path / 'ade')
    write_config(tmp_path / 'tiny.py', tmp_path / 'ade')
    env = {key: value for key, value in os.environ.items() if key != 'MMVSSM_DEBUG'}
    done = subprocess.run(
        [sys.executable, REPO / 'tools/train.py', 'tiny.py', '--work-dir', 'out'],
        cwd=tmp_path,
        env={**env, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    for start in quiet._NOISE:
        assert not re.search(start, output), start
    assert 'UserWarning' not in output
    # What is worth a warning shows, with what it is about.
    warned = re.findall(r'WARNING - (.*)', output)
    assert warned and all('of the 150 classes' in line for line in warned)


@pytest.fixture
def _undone(monkeypatch):
    from mmengine import logging as mm_logging

    monkeypatch.setattr(MMLogger, 'filter', logging.Logger.filter)
    monkeypatch.setattr(mm_logging, 'print_log', mm_logging.print_log)
    # Filters of warnings are those of before after each test.


@pytest.mark.usefixtures('_undone')
def test_other_messages_show(capsys):
    from mmengine import logging as mm_logging

    quiet.silence_noise()
    quiet.silence_noise()
    logger = MMLogger('mmvssm quiet', 'mmvssm quiet')
    for text in ('Could not import OneDL', 'Could not import it'):
        mm_logging.print_log(text)
        mm_logging.print_log(text, logger)
    out = capsys.readouterr().out
    assert 'OneDL' not in out and out.count('Could not import it') == 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        quiet.silence_noise()
        for text in ('Default ``avg_non_ignore`` is False, x', 'The drawing failed'):
            warnings.warn(text, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ['The drawing failed']


def grad_strides(sizes):
    return (
        'Grad strides do not match bucket view strides. This may x\n'
        f'grad.sizes() = {sizes}, strides() = [9, 1, 3, 1]\n'
    )


@pytest.mark.parametrize('sizes, shows', [([64, 1, 3, 3], 0), ([64, 8, 3, 3], 1)])
def test_strides_of_depthwise_filters_do_not_matter(sizes, shows):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        quiet.silence_noise()
        warnings.warn(grad_strides(sizes), stacklevel=1)
    assert len(caught) == shows


@pytest.mark.usefixtures('_undone')
def test_a_later_call_replaces_the_pattern(capsys):
    from mmengine import logging as mm_logging

    compat.drop_messages(re.compile('a'))
    compat.drop_messages(re.compile('b'))
    mm_logging.print_log('a')
    mm_logging.print_log('b')
    assert capsys.readouterr().out == 'a\n'
