"""Kernels in CUDA C++: compiled for the constants of a call, kept, and launched.

A kernel is compiled once for each set of constants and each kind of GPU, by NVRTC
(see ``nvrtc.py``), and kept in the folder that :func:`cache_folder` names. Sizes and
strides are no constants: a training at many image sizes needs few kernels.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mmvssm.ops.cache import cache_folder
from mmvssm.ops.cuda import driver, nvrtc
from mmvssm.ops.typed import assume_constant_result

# The oldest compute capability: asynchronous copies and bfloat16 products.
OLDEST = 80
# Bytes of shared memory that a CTA may have where there is no GPU to ask: an H100's.
SHARED_MEMORY = 227 * 1024
Constants = Mapping[str, int]


@dataclass(frozen=True)
class Kernel:
    """A kernel's source.

    Attributes:
        source: File in the folder of this module.
        entry: Name of the kernel in it.
    """

    source: str
    entry: str

    @property
    def path(self) -> Path:
        """The file."""
        return nvrtc.FOLDER / self.source

    def launch(
        self,
        constants: Constants,
        args: ctypes.Structure,
        *,
        grid: int,
        threads: int,
        shared: int = 0,
        on: Tensor,
    ) -> None:
        """Put the kernel onto the current stream of a tensor's device.

        Args:
            constants: What it is compiled for.
            args: Its one argument.
            grid: CTAs.
            threads: Of a CTA.
            shared: Bytes of dynamic shared memory of a CTA.
            on: A tensor of the call.

        Raises:
            ValueError: There are more CTAs than CUDA counts.
            RuntimeError: It cannot be compiled, or CUDA refuses.
        """
        if not 0 < grid < 2**31:
            raise ValueError(
                f"{self.entry} of the backend 'cuda' would take {grid} blocks, of "
                f'which CUDA counts 1 to 2^31 - 1; split the batch'
            )
        _machines[-1].launch(Launch(self, constants, args, grid, threads, shared), on)


class Launch(NamedTuple):
    """A kernel with all that it is launched with, see :meth:`Kernel.launch`."""

    kernel: Kernel
    constants: Constants
    args: ctypes.Structure
    grid: int
    threads: int
    shared: int

    @property
    def binary(self) -> tuple[Kernel, tuple[tuple[str, int], ...]]:
        """What tells compiled kernels apart."""
        return self.kernel, tuple(sorted(self.constants.items()))


class Machine(Protocol):
    """What kernels are launched on.

    Attributes:
        devices: Types of the devices whose tensors it takes.
    """

    devices: tuple[str, ...]

    def launch(self, launch: Launch, on: Tensor) -> None:
        """Run a kernel, or put it where it will run."""

    def multiprocessors(self, on: Tensor) -> int:
        """How many there are on a tensor's device."""

    def shared_memory(self, on: Tensor) -> int:
        """Bytes that a CTA may have on a tensor's device."""

    def unavailable(self) -> str | None:
        """Why nothing can be launched here, or None."""


class Gpu:
    """NVIDIA's GPUs."""

    devices: tuple[str, ...] = ('cuda',)

    def __init__(self) -> None:
        self._loaded: dict[object, driver.Function] = {}
        self._failure: str | None = None

    def launch(self, launch: Launch, on: Tensor) -> None:
        """Put a kernel onto the current stream of a tensor's device."""
        with torch.cuda.device(on.device):
            function = self._function(launch, on.device)
            stream = torch.cuda.current_stream(on.device).cuda_stream
            function.launch(
                launch.grid, launch.threads, launch.shared, stream, launch.args
            )

    def multiprocessors(self, on: Tensor) -> int:
        """How many there are on a tensor's device."""
        return _properties(on.device).multi_processor_count

    def shared_memory(self, on: Tensor) -> int:
        """Bytes that a CTA may have on a tensor's device."""
        properties = _properties(on.device)
        # What any GPU has without asking, where torch does not say more.
        return int(getattr(properties, 'shared_memory_per_block_optin', 48 * 1024))

    def unavailable(self) -> str | None:
        """Why nothing can be launched here, or None."""
        return self._failure or _machine_lacks()

    def _function(self, launch: Launch, device: torch.device) -> driver.Function:
        key = (device, *launch.binary)
        found = self._loaded.get(key)
        if found is None:
            try:
                code = compiled(launch.kernel, launch.constants, _capability(device))
                found = driver.Function(code, launch.kernel.entry, launch.shared)
            except (OSError, RuntimeError) as error:
                self._failure = str(error)
                raise RuntimeError(
                    f"the scan backend 'cuda' cannot run: {error}"
                ) from error
            self._loaded[key] = found
        return found


class Recorder:
    """Writes launches down and runs nothing; takes tensors without values, too."""

    devices: tuple[str, ...] = ('cuda', 'cpu', 'meta')

    def __init__(self, multiprocessors: int) -> None:
        self.launches: list[Launch] = []
        self._multiprocessors = multiprocessors

    def launch(self, launch: Launch, on: Tensor) -> None:
        """Write a launch down."""
        self.launches.append(launch)

    def multiprocessors(self, on: Tensor) -> int:
        """As many as were said."""
        return self._multiprocessors

    def shared_memory(self, on: Tensor) -> int:
        """As an H100 has."""
        return SHARED_MEMORY

    def unavailable(self) -> str | None:
        """None: anything can be written down."""
        return None


_machines: list[Machine] = [Gpu()]


@contextlib.contextmanager
def use_machine(machine: Machine) -> Iterator[None]:
    """Launch kernels on another machine inside the ``with`` block."""
    _machines.append(machine)
    try:
        yield
    finally:
        _machines.remove(machine)


@contextlib.contextmanager
def recording(multiprocessors: int = 132) -> Iterator[list[Launch]]:
    """Write launches down inside the ``with`` block instead of running them.

    Args:
        multiprocessors: Of the GPU that is thought of.

    Yields:
        The launches, in order.
    """
    recorder = Recorder(multiprocessors)
    with use_machine(recorder):
        yield recorder.launches


def devices() -> tuple[str, ...]:
    """Types of the devices whose tensors kernels take."""
    return _machines[-1].devices


def multiprocessors(on: Tensor) -> int:
    """How many there are on a tensor's device."""
    return _machines[-1].multiprocessors(on)


def shared_memory(on: Tensor) -> int:
    """Bytes that a CTA may have on a tensor's device."""
    return _machines[-1].shared_memory(on)


# torch.compile asks once and does not trace what follows.
@assume_constant_result
def unavailable() -> str | None:
    """Why the kernels cannot run here, or None; nothing is compiled to find out."""
    return _machines[-1].unavailable()


@functools.cache
def _machine_lacks() -> str | None:
    if torch.version.hip is not None:
        return "it is for NVIDIA's GPUs; AMD's (ROCm) get the backend 'torch'"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return f'torch {torch.__version__} sees no CUDA device'
    capability = '.'.join(map(str, torch.cuda.get_device_capability()))
    if float(capability) < OLDEST / 10:
        return f'the GPU has compute capability {capability}, it takes 8.0 and later'
    try:
        driver.library()
    except OSError as error:
        return f"CUDA's driver cannot be reached: {error}"
    if _nvrtc_path() is None:
        return (
            f'there is no NVRTC of CUDA {torch.version.cuda} to compile it with '
            f'(pip install nvidia-cuda-nvrtc)'
        )
    return None


@functools.cache
def _properties(device: torch.device) -> torch.cuda._CudaDeviceProperties:
    return torch.cuda.get_device_properties(device)


def _capability(device: torch.device) -> int:
    properties = _properties(device)
    return 10 * properties.major + properties.minor


# Compilation


@functools.cache
def _nvrtc_path() -> str | None:
    major = (torch.version.cuda or '').partition('.')[0]
    return nvrtc.find_library(major or None)


@functools.cache
def compiler() -> nvrtc.Nvrtc:
    """The compiler.

    Raises:
        OSError: There is none.
    """
    path = _nvrtc_path()
    if path is None:
        raise OSError('there is no NVRTC (pip install nvidia-cuda-nvrtc)')
    return nvrtc.Nvrtc(path)


@functools.cache
def digest() -> str:
    """Identifies the sources and the options they are compiled with."""
    found = hashlib.sha256(repr(nvrtc.OPTIONS[:-1]).encode())
    for path in sorted([*nvrtc.FOLDER.glob('*.cu'), *nvrtc.FOLDER.glob('*.h')]):
        found.update(path.name.encode() + b'\0' + path.read_bytes() + b'\0')
    return found.hexdigest()[:16]


def _kept(kernel: Kernel, constants: Constants, architecture: str) -> Path:
    """Where the compiled kernel is kept."""
    text = json.dumps([kernel.source, architecture, sorted(constants.items())])
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = f'cuda-{digest()}-{compiler().version}'
    return cache_folder() / folder / f'{kernel.entry}-{name}.cubin'


def compiled(kernel: Kernel, constants: Constants, capability: int) -> bytes:
    """A kernel for a kind of GPU, compiled now if it is not kept.

    Args:
        kernel: Which one.
        constants: Its macros.
        capability: Compute capability without its point.

    Returns:
        What the driver loads.

    Raises:
        CompileError: NVRTC refuses it.
        OSError: There is no NVRTC.
    """
    architecture = compiler().architecture(capability)
    path = _kept(kernel, constants, architecture)
    with contextlib.suppress(OSError):
        return path.read_bytes()
    with _one_at_a_time(path):
        # Another process may have compiled it in the meantime.
        with contextlib.suppress(OSError):
            return path.read_bytes()
        code = compiler().compile(kernel.path, constants, architecture)
        # A folder that cannot be written to costs a compilation in each process.
        with contextlib.suppress(OSError):
            nvrtc.write_whole(path, code)
    return code


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Of several processes one compiles a kernel, and the others wait for it."""
    try:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix('.lock').open('w')
        fcntl.flock(lock, fcntl.LOCK_EX)
    except (ImportError, OSError):
        # Then several may compile, each into a file of its own.
        yield
        return
    with lock:
        yield


def prepare(
    launches: Iterable[Launch], capability: int, processes: int | None = None
) -> int:
    """Compile what launches need, in several processes.

    Args:
        launches: See :func:`recording`.
        capability: Of the GPU, without its point.
        processes: How many, by default as many as this process has cores.

    Returns:
        The number of kernels that were not yet kept.

    Raises:
        RuntimeError: NVRTC refuses one, with what it says, or the folder cannot be
            written to.
        OSError: There is no NVRTC.
    """
    architecture = compiler().architecture(capability)
    missing = []
    for kernel, constants in dict.fromkeys(launch.binary for launch in launches):
        path = _kept(kernel, dict(constants), architecture)
        if not path.exists():
            task = (str(kernel.path), dict(constants), architecture, str(path))
            missing.append(task)
    count = min(processes or _cores(), len(missing))
    command = [sys.executable, nvrtc.__file__, str(_nvrtc_path())]
    workers = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(count)
    ]
    failures = []
    for i, worker in enumerate(workers):
        assert worker.stdin is not None
        # One that has ended says why below.
        with contextlib.suppress(BrokenPipeError), worker.stdin:
            json.dump(missing[i::count], worker.stdin)
    for worker in workers:
        assert worker.stderr is not None
        said = worker.stderr.read().strip()
        if worker.wait():
            why = (
                said.rpartition('\n')[2] or f'a process ended with {worker.returncode}'
            )
            failures.append(why)
    if failures:
        raise RuntimeError(f"the scan backend 'cuda' cannot run: {failures[0]}")
    return len(missing)


def _cores() -> int:
    """Of this process."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
