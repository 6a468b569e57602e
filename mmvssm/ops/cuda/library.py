"""Loads the CUDA kernels and calls them.

They are reached through ctypes as the CPU kernels are: a binding to torch's C++
interface would have to be compiled for each version of torch, in minutes. The
library is the one compiled when mmvssm was installed, or else is compiled for
the GPU at hand at the first call and kept in a folder of the user's.

Environment variables, read when the library is first used:
    MMVSSM_CUDA_LIBRARY: Path of another build of the library.
"""

import ctypes
import logging
import os
from ctypes import c_char_p, c_int32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmvssm.ops.cache import cache_folder
from mmvssm.ops.cuda import build
from mmvssm.ops.kernel_args import Array, fields
from mmvssm.ops.typed import assume_constant_result

LIBRARY_VARIABLE = 'MMVSSM_CUDA_LIBRARY'
# Positions from one saved state to the next, as in problem.h.
CHUNK = 16
# Features that the kernels project to steps, and the states they do it with.
MAX_RANK, MAX_RANK_STATES = 32, 16


class ScanProblem(ctypes.Structure):
    """A selective scan."""

    _fields_ = fields(
        (c_int32, 'device batch groups group_size length places'),
        (c_int32, 'width route states rank'),
        (c_int32, 'stretches stretch_length softplus add tile'),
        (c_void_p, 'table'),
        (Array, 'u delta z features B C'),
        (c_void_p, 'weight A D bias'),
        (Array, 'out'),
        (c_void_p, 'last_state saved edges steps'),
        (Array, 'grad_out'),
        (c_void_p, 'grad_last_state'),
        (Array, 'grad_u grad_delta grad_z'),
        (c_void_p, 'grad_B grad_C grad_A grad_D grad_bias'),
    )


_failure: list[str] = []


# torch.compile asks once and does not trace what follows.
@assume_constant_result
def unavailable() -> str | None:
    """Why the kernels cannot run here, or None; nothing is compiled to find out."""
    if torch.version.hip is not None:
        return "AMD GPUs (ROCm) are served by the backend 'torch'"
    if _failure:
        return _failure[0]
    path = os.environ.get(LIBRARY_VARIABLE)
    if path is not None:
        return _why_not_loaded(path)
    return _machine_lacks()


@cache
def _machine_lacks() -> str | None:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return f'torch {torch.__version__} sees no CUDA device'
    capability = '.'.join(map(str, torch.cuda.get_device_capability()))
    if float(capability) < build.OLDEST / 10:
        return f'the GPU has compute capability {capability}, it takes 8.0 and later'
    if _installed().exists() and _why_not_loaded(str(_installed())) is None:
        return None
    if os.name != 'posix':
        return 'it is compiled on Linux only'
    try:
        build.find_nvcc()
    except FileNotFoundError as error:
        return str(error)
    return None


def _installed() -> Path:
    """Where an installation with nvcc puts the library."""
    return Path(__file__).with_name('_kernels.so')


def _why_not_loaded(path: str) -> str | None:
    try:
        _load(path)
    except OSError as error:
        return str(error)
    return None


@cache
def _load(path: str) -> ctypes.CDLL:
    """Open a library.

    Raises:
        OSError: It is none, or of another version.
    """
    library = ctypes.CDLL(path)
    about: Any = getattr(library, 'mmvssm_cuda_digest', lambda: None)
    about.restype = c_char_p
    same_sources = about() == build.digest().encode()
    if not same_sources or library.mmvssm_problem_size() != ctypes.sizeof(ScanProblem):
        raise OSError(
            f'{path} was built from the sources of another version; install mmvssm '
            f'again, or remove the file'
        )
    library.mmvssm_cuda_error.restype = c_char_p
    return library


@cache
def _library() -> ctypes.CDLL:
    """The library, compiled if need be.

    Raises:
        RuntimeError: It cannot be.
    """
    try:
        path = os.environ.get(LIBRARY_VARIABLE)
        if path is None and _why_not_loaded(str(_installed())) is None:
            path = str(_installed())
        return _load(path or str(_compiled()))
    except (OSError, RuntimeError) as error:
        _failure.append(str(error))
        raise RuntimeError(f"the scan backend 'cuda' cannot run: {error}") from error


def _compiled() -> Path:
    """The library for this GPU in the cache, compiled now if it is not there."""
    import fcntl

    nvcc = build.find_nvcc()
    major, minor = torch.cuda.get_device_capability()
    names = build.digest(), build.nvcc_version(nvcc), f'sm_{major}{minor}'
    library = cache_folder() / f'cuda-{"-".join(names)}.so'
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    # Of several processes one compiles and the others wait for it.
    with library.with_suffix('.lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            logging.getLogger(__name__).warning(
                'compiling the CUDA kernels of mmvssm, once for this machine'
            )
            build.compile_library(library, nvcc, [f'{major}{minor}'])
    return library


def tile(function: str, states: int, group_size: int) -> int:
    """Channels of a block of ``scan_forward`` or ``scan_backward``."""
    find = getattr(_library(), f'mmvssm_{function}_tile')
    return int(find(c_int32(states), c_int32(group_size)))


def call(function: str, problem: ctypes.Structure, on: Tensor) -> None:
    """Put kernels onto the current stream of a tensor's device.

    Args:
        function: ``scan_forward`` or ``scan_backward``.
        problem: What it takes.
        on: A tensor of the call.

    Raises:
        RuntimeError: CUDA refuses.
    """
    stream = torch.cuda.current_stream(on.device).cuda_stream if on.is_cuda else None
    library = _library()
    status = getattr(library, f'mmvssm_{function}')(
        ctypes.byref(problem), c_void_p(stream)
    )
    if status:
        reason = library.mmvssm_cuda_error(status).decode()
        raise RuntimeError(f"{function} of the scan backend 'cuda': {reason}")
