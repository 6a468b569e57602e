import pytest
import torch

from mmvssm.ops.cuda import kernels

from .cuda_emulation import Emulator


@pytest.fixture(autouse=True)
def emulated_gpu():
    """The CUDA kernels run on the CPU and take its tensors."""
    with kernels.use_machine(Emulator()):
        yield


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
