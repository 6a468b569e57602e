import dataclasses
import os
from contextlib import nullcontext

import pytest
import torch

from mmvssm.ops import backends
from mmvssm.ops.triton import runtime, tiles

from .quick_interpreter import quick_interpreter

if os.environ.get('MMVSSM_TEST_CUDA_ON_CPU') == '1':
    # The CUDA kernels, compiled for the CPU by test_cuda.py, take its tensors.
    emulated = dataclasses.replace(backends.suppliers['cuda'], devices=('cpu',))
    backends.suppliers['cuda'] = emulated


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill ``torch.empty`` with NaN, so that no value left unwritten passes.

    torch does so in its deterministic mode, which also refuses operations
    whose result is not reproducible.
    """
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def set_threads():
    """Set the number of torch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope='session')
def quick_triton():
    """Where Triton's interpreter runs the kernels, it does so in half the time."""
    with quick_interpreter() if runtime.INTERPRETED else nullcontext():
        yield


@pytest.fixture(autouse=True)
def short_chunks(request, monkeypatch):
    """Tests of all backends are of few positions, which need not be padded to 16.

    In Triton's interpreter every one takes its time, whether it is there or not.
    """
    if runtime.INTERPRETED and request.path.name.startswith('test_'):
        monkeypatch.setattr(tiles, 'SCAN_CHUNK', 4)
