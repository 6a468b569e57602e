"""The check of GPU kernels on the CPU, where others stand in for them."""

import pytest
import torch

from mmvssm.ops import backends
from mmvssm.ops.gpu_check import choice, stand_in
from mmvssm.ops.operator import all_ops


@pytest.fixture(autouse=True)
def emulated_gpu():
    """There is none here."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Verdicts of a test are its own."""
    monkeypatch.setenv('MMVSSM_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.delenv('MMVSSM_GPU_CHECK', raising=False)
    # The check runs as users run it.
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def as_it_was():
    """What a stand-in replaces and what has been found go with the test."""
    suppliers = dict(backends.suppliers)
    supplied = {op: dict(op.backends) for op in all_ops.values()}
    choice.forget()
    yield
    choice.forget()
    backends.suppliers.update(suppliers)
    for op, found in supplied.items():
        op.backends.update(found)


@pytest.fixture
def kernels_stand_in():
    """Sound kernels for the CPU in the place of those for the GPU."""
    stand_in.install()
