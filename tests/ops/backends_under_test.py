"""The scan backends that tests run on, and how exact each one is.

They are those for tensors on the CPU, and the CUDA kernels, which an emulator runs
there (see ``cuda_emulation/``). What cannot run here is skipped with the reason.
MMVSSM_REQUIRE_KERNELS=1, which also makes a failed build an error, turns the absence
of the compiled kernels into failures.
"""

import os

import pytest
import torch

from mmvssm.ops import backend_status, backends, list_backends
from mmvssm.ops.cpu import library

from .cuda_emulation import Emulator

EMULATED = 'cuda'
BACKENDS = [
    name
    for name in list_backends()
    if name == EMULATED or backends.suppliers[name].devices in (None, ('cpu',))
]
FAST_BACKENDS = [name for name in BACKENDS if name != 'reference']
# For what is large, or about the threads of the CPU.
NATIVE_BACKENDS = [name for name in FAST_BACKENDS if name != EMULATED]
ISAS = ('baseline', 'avx2', 'avx512')
_KERNELS_REQUIRED = os.environ.get('MMVSSM_REQUIRE_KERNELS', '0') not in ('', '0')


def takes(backend: str, dtype: torch.dtype) -> bool:
    """Whether activations of this dtype are among those of the backend."""
    return dtype in backends.suppliers[backend].dtypes


def precision(backend: str) -> tuple[torch.dtype, float]:
    """Widest dtype of a backend, and the relative error it may have in it."""
    if takes(backend, torch.float64):
        return torch.float64, 1e-12
    return torch.float32, 2e-6


def skips(backend: str) -> tuple[pytest.MarkDecorator, ...]:
    """Marks that skip what needs the backend where it cannot run."""
    status = backend_status() | {EMULATED: Emulator().unavailable()}
    reason = status[backend]
    if reason is None or (backend == 'cpu' and _KERNELS_REQUIRED):
        return ()
    return (pytest.mark.skip(reason=f'{backend}: {reason}'),)


def on_backends(*names: str) -> pytest.MarkDecorator:
    """Run a test on each of these backends."""
    return pytest.mark.parametrize('backend', [on(name) for name in names])


def on(backend: str, *values):
    """Values of a parametrised test, the first one being a backend."""
    return pytest.param(backend, *values, marks=skips(backend))


def on_every_isa() -> pytest.MarkDecorator:
    """Run a test of the compiled kernels with each instruction set."""
    return pytest.mark.parametrize('isa', every_isa())


def every_isa():
    """The instruction sets as parameters; those that cannot be had are skipped."""
    return [_isa(name) for name in ISAS]


def _isa(name: str):
    marks = skips('cpu')
    if library.unavailable() is None and name not in library.available_isas():
        marks = (pytest.mark.skip(reason=f'this machine lacks {name}'),)
    return pytest.param(name, marks=marks)
