import importlib

import pytest

from tiny import REPO

BENCHMARKS = REPO / 'benchmarks'


@pytest.fixture
def load(monkeypatch):
    """Import a module from beside the benchmarks."""
    if not BENCHMARKS.exists():
        pytest.skip('there are none in a source distribution')
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def device(load):
    """Where tests measure: no time means anything there."""
    return load('gpu_device').Device('cpu')
