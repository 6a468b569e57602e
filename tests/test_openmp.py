"""How long torch's threads wait is set before torch is loaded, or not at all."""

import os
import subprocess
import sys

import pytest

from mmvssm import openmp

VARIABLES = ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')


@pytest.fixture
def no_torch(monkeypatch):
    """As before torch is loaded."""
    monkeypatch.delitem(sys.modules, 'torch')
    for name in VARIABLES:
        # Set first: what is set later is taken back with it.
        monkeypatch.setenv(name, '')
        monkeypatch.delenv(name)


def test_a_short_wait(no_torch):
    assert openmp.shorten_wait()
    assert os.environ['GOMP_SPINCOUNT'] == str(openmp.SPIN_COUNT)


@pytest.mark.parametrize('name', VARIABLES)
def test_what_is_set_stays(no_torch, monkeypatch, name):
    monkeypatch.setenv(name, 'PASSIVE')
    assert not openmp.shorten_wait()
    assert [os.environ.get(name) for name in VARIABLES].count(None) == 1


def test_too_late_behind_torch(no_torch, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', object())
    assert not openmp.shorten_wait()
    assert 'GOMP_SPINCOUNT' not in os.environ


def test_importing_the_package_comes_first():
    """What libgomp was told is in the environment when torch loads it."""
    script = (
        'import os, sys, importlib.abc\n'
        'class Look(importlib.abc.MetaPathFinder):\n'
        '    def find_spec(self, name, *_):\n'
        '        if name == "torch":\n'
        '            print(os.environ.get("GOMP_SPINCOUNT"))\n'
        '            sys.exit()\n'
        'sys.meta_path.insert(0, Look())\n'
        'import mmvssm\n'
    )
    plain = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    done = subprocess.run(
        [sys.executable, '-c', script], env=plain, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(openmp.SPIN_COUNT), done.stderr
