"""What runs on a GPU. Everything here is skipped where there is none.

Environment variables:
    MMVSSM_GPU_TESTS_DEVICE: ``cpu`` runs what does not need CUDA itself on the
        CPU, on small shapes: to check these tests, not the kernels.
    MMVSSM_GPU_TESTS_SECONDS: After so many no further test is begun.
"""

import os
import time

import pytest
import torch

from .on_device import CUDA, DEVICE

# cuBLAS gives the same bits only with workspaces of its own; read at its start.
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
END = time.monotonic() + float(os.environ.get('MMVSSM_GPU_TESTS_SECONDS', 'inf'))


def pytest_runtest_setup(item):
    if CUDA and not torch.cuda.is_available():
        pytest.skip('torch sees no CUDA device')
    if not CUDA and item.get_closest_marker('cuda'):
        pytest.skip(f'needs CUDA, not {DEVICE}')
    if time.monotonic() > END:
        pytest.skip('the time of MMVSSM_GPU_TESTS_SECONDS is out')


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """Fill ``torch.empty`` with NaN, so that no value left unwritten passes.

    torch does so in its deterministic mode. What a model has beside our ops need
    not have such a mode: of that it only warns.
    """
    torch.use_deterministic_algorithms(
        'mamba_ssm' not in request.node.name,
        warn_only=request.module.__name__.endswith('test_models'),
    )
    yield
    torch.use_deterministic_algorithms(False)
    # Or compiled forms of one function for ever more arguments add up.
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """By default the GPU rounds their inputs, float32, to fewer digits."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
