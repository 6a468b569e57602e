"""Times, peak memory and facts of a GPU; of the CPU, too, to try the logic."""

import itertools
import math
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from importlib import metadata

import torch

from mmvssm.analysis.measuring.timing import Effort, reason, samples
from mmvssm.ops.cuda import kernels

# What is measured is to read this many times the cache before it reads the
# same memory again; more sets of inputs than that are not made.
_CACHES = 3
_MOST_SETS = 16
# Seconds of work in a sample, and the most calls.
_SAMPLE = 2e-3
_MOST_CALLS = 50
# Cycles in a second at most; makes a pause on the GPU long enough.
_CLOCK = 2e9


@dataclass(frozen=True)
class Device:
    """What torch calls a device, and how it is measured."""

    name: str

    @property
    def is_cuda(self) -> bool:
        return torch.device(self.name).type == 'cuda'

    def synchronize(self) -> None:
        """Wait until all work is done."""
        if self.is_cuda:
            torch.cuda.synchronize(self.name)

    def sets(self, bytes_of_one: int) -> int:
        """How many sets of inputs take turns so that no cache holds the next one."""
        if not self.is_cuda:
            return 2
        cache = torch.cuda.get_device_properties(self.name).L2_cache_size
        return max(1, min(_MOST_SETS, math.ceil(_CACHES * cache / bytes_of_one)))

    def free_memory(self) -> float:
        """Bytes that can still be taken; of the CPU nothing is known."""
        if not self.is_cuda:
            return math.inf
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.name)[0]

    def measure(
        self,
        functions: dict[Hashable, Callable[[], object]],
        effort: Effort,
        hide_host: bool = True,
    ) -> dict[Hashable, dict]:
        """Time functions in turn; what fails is left out of the turns.

        Args:
            functions: Each is one call; the first two are not counted.
            hide_host: Let the GPU begin when all calls of a sample have been
                submitted, so that the time is that of the GPU alone.

        Returns:
            For each function ``median``, all ``samples`` in seconds, ``calls``
            of each sample and ``peak`` bytes above what was allocated before
            (None on the CPU), or ``failed`` with the reason.
        """
        found, samplers = {}, {}
        for name, function in functions.items():
            try:
                function()
                seconds, host, peak = self._try(function)
            except Exception as error:
                found[name] = dict(failed=reason(error))
                self.free_memory()
                continue
            calls = max(1, min(_MOST_CALLS, int(_SAMPLE / seconds)))
            pause = 2 * host * calls if hide_host else 0.0
            samplers[name] = self._sampler(function, calls, pause)
            found[name] = dict(calls=calls, peak=peak)
        for name, taken in samples(samplers, effort).items():
            found[name] |= dict(median=statistics.median(taken), samples=taken)
        return found

    def _try(self, function: Callable[[], object]) -> tuple[float, float, int | None]:
        """Seconds until done, seconds until submitted, peak memory, of one call."""
        before = 0
        if self.is_cuda:
            self.synchronize()
            torch.cuda.reset_peak_memory_stats(self.name)
            before = torch.cuda.memory_allocated(self.name)
        start = time.perf_counter()
        function()
        host = time.perf_counter() - start
        self.synchronize()
        seconds = time.perf_counter() - start
        peak = None
        if self.is_cuda:
            peak = torch.cuda.max_memory_allocated(self.name) - before
        return seconds, host, peak

    def _sampler(
        self, function: Callable[[], object], calls: int, pause: float
    ) -> Callable[[], float]:
        """A function that measures itself, for :func:`timing.samples`."""

        def on_cpu() -> float:
            start = time.perf_counter()
            for _ in range(calls):
                function()
            return (time.perf_counter() - start) / calls

        def on_cuda() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if pause:
                torch.cuda._sleep(int(min(pause, 0.1) * _CLOCK))
            start.record()
            for _ in range(calls):
                function()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / calls

        return on_cuda if self.is_cuda else on_cpu

    def facts(self) -> dict[str, str | int]:
        """Hardware and versions."""
        found = dict(
            device=platform.processor() or platform.machine(),
            python=platform.python_version(),
            torch=torch.__version__,
            mamba_ssm=_version('mamba-ssm'),
            timm=_version('timm'),
            nvrtc=_nvrtc(),
            tf32_matmul=torch.backends.cuda.matmul.allow_tf32,
            tf32_convolution=torch.backends.cudnn.allow_tf32,
            argv=sys.argv[1:],
            time=time.strftime('%Y-%m-%d %H:%M:%S %z'),
        )
        if self.is_cuda:
            gpu = torch.cuda.get_device_properties(self.name)
            query = '--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit'
            found |= dict(
                device=gpu.name,
                capability=f'{gpu.major}.{gpu.minor}',
                multiprocessors=gpu.multi_processor_count,
                memory=gpu.total_memory,
                cache=gpu.L2_cache_size,
                cuda=torch.version.cuda,
                driver_and_clocks=_last_line('nvidia-smi', query, '--format=csv'),
            )
        return found


def turns(items: Iterable) -> Callable[[], object]:
    """A function that returns one item after the other, for ever."""
    return itertools.cycle(list(items)).__next__


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return 'not installed'


def _nvrtc() -> str:
    """The version of what compiles our kernels, or why there is none."""
    try:
        return kernels.compiler().version
    except (OSError, RuntimeError) as error:
        return reason(error)


def _last_line(program: str, *arguments: str) -> str:
    if shutil.which(program) is None:
        return f'no {program}'
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    return (done.stdout.strip().splitlines() or ['no answer'])[-1]
