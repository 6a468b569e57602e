import importlib
import os

import pytest

from mmvssm.ops.cuda import kernels
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


@pytest.fixture
def sass_model(load):
    """benchmarks/sass_model.py, where NVRTC and NVIDIA's programs are installed.

    MMVSSM_REQUIRE_KERNELS=1 makes it an error that they are not.
    """
    try:
        kernels.compiler()
        for name in ('nvdisasm', 'cuobjdump'):
            load('cubin').program(name)
    except OSError as missing:
        if os.environ.get('MMVSSM_REQUIRE_KERNELS', '0') not in ('', '0'):
            raise
        pytest.skip(str(missing))
    return load('sass_model')
