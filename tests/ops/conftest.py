import contextlib
import dataclasses
import os

import pytest
import torch

from mmvssm.ops import backends
from mmvssm.ops.cuda import kernels

from .cuda_emulation import Emulator

_machine = contextlib.ExitStack()
if os.environ.get('MMVSSM_TEST_CUDA_ON_CPU') == '1':
    # In this process the CUDA kernels run on the CPU and take its tensors.
    _machine.enter_context(kernels.use_machine(Emulator()))
    emulated = dataclasses.replace(backends.suppliers['cuda'], devices=('cpu',))
    backends.suppliers['cuda'] = emulated


def pytest_unconfigure():
    _machine.close()


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
