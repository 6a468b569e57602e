import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill ``torch.empty`` with NaN, so that no value left unwritten passes.

    torch does so in its deterministic mode, which also refuses operations
    whose result is not reproducible.
    """
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
