"""The floor: the least time this machine could take for a scan.

It is the larger of two times, that of moving the tensors at the streaming
bandwidth (two arrays read, one written past the caches, far larger than they
are) and that of the arithmetic at the rates of exp2, softplus and multiply-add
on data in the fastest cache. The rates are those of ``floor.cpp``, which uses
the kernels' own functions and is compiled here, for the instruction set that the
kernels use. For E = batch * channels *
length elements and W = batch * groups * states * length weights of B or C:

========  ==================  ==========  ========  ===================
pass      bytes               exp2        softplus  multiply-adds
========  ==================  ==========  ========  ===================
forward   4 (3 E + 2 W)       N E         E         (4 N + 3) E
backward  4 (5 E + 4 W)       (N + 1) E   E         (14 N + 12) E
========  ==================  ==========  ========  ===================

Forward reads u, delta, B and C and writes y. Backward, which recomputes the
states, reads these and the gradient of y and writes the gradients of u, delta,
B and C.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from ctypes import c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch

from mmvssm.engine import UsageError
from mmvssm.ops import cpu
from mmvssm.ops.cpu import library

HERE = Path(__file__).resolve().parent
SOURCE = HERE / 'floor.cpp'
HEADERS = Path(cpu.__file__).parent
BUILD = HERE.parent / 'build' / 'benchmarks'
FLAGS = ('-O3', '-std=c++17', '-shared', '-fPIC', '-pthread', '-w', f'-I{HEADERS}')
# Processors that have just the instruction set of a kernel.
PROCESSORS = {'baseline': 'x86-64', 'avx2': 'x86-64-v3', 'avx512': 'x86-64-v4'}
# Operations on an element, by N: of exp2, softplus and multiply-add.
OPERATIONS = {
    'forward': lambda n: dict(exp2=n, softplus=1, fma=4 * n + 3),
    'backward': lambda n: dict(exp2=n + 1, softplus=1, fma=14 * n + 12),
}
# Tensors of E and of W values that are moved.
MOVED = {'forward': (3, 2), 'backward': (5, 4)}


def compiler() -> str:
    """Path of the C++ compiler: ``CXX``, or the first one there is.

    Raises:
        UsageError: There is none.
    """
    for name in (os.environ.get('CXX'), 'c++', 'g++', 'clang++'):
        path = name and shutil.which(name)
        if path:
            return path
    raise UsageError(
        'the floor is measured by a small C++ program, and there is no compiler '
        'on the path (c++, g++, clang++, or name one in CXX).'
    )


def build() -> Path:
    """Compile ``floor.cpp`` unless this machine has it in ``build/`` already.

    It is compiled for the instruction set that the kernels use.

    Raises:
        UsageError: There is no compiler, or it fails.
    """
    isa = library.isa()
    command = [compiler(), *FLAGS, f'-DMMVSSM_ISA={isa}']
    if platform.machine() in ('x86_64', 'AMD64'):
        command.append(f'-march={PROCESSORS[isa]}')
    key = hashlib.sha256(' '.join((*command, platform.node())).encode())
    for source in (SOURCE, HEADERS / 'vec.h', HEADERS / 'functions.h'):
        key.update(source.read_bytes())
    built = BUILD / f'floor-{key.hexdigest()[:16]}.so'
    if not built.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        # Under another name first: a build that is cut off leaves no library.
        unfinished = built.with_suffix(f'.{os.getpid()}')
        done = subprocess.run(
            [*command, str(SOURCE), '-o', str(unfinished)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise UsageError(f'{command[0]} does not compile {SOURCE}:\n{done.stderr}')
        unfinished.replace(built)
    return built


class Floor:
    """Measures the rates, on threads of torch's pool.

    Args:
        values: Of each of the three arrays that are streamed.
        passes: Over the data in the cache.

    Raises:
        UsageError: ``floor.cpp`` cannot be compiled.
    """

    def __init__(self, values: int = 2**25, passes: int = 100_000):
        self._library = ctypes.CDLL(str(build()))
        for name in ('stream', 'exp2', 'softplus', 'fma'):
            getattr(self._library, f'floor_{name}').restype = c_double
        self._arrays = [torch.ones(values) for _ in range(3)]
        self._passes = passes

    def functions(self, threads: int) -> dict[str, Callable[[], float]]:
        """Functions that each measure the seconds of one byte or operation."""
        lib, passes = self._library, c_int64(self._passes)
        pool = library.parallel_for(), c_int(threads)
        values = self._arrays[0].numel()
        pointers = [c_void_p(x.data_ptr()) for x in self._arrays]
        mapped = self._passes * threads * lib.floor_values()

        def stream() -> float:
            seconds = lib.floor_stream(*pool, c_int64(values), *pointers)
            return seconds / (3 * 4 * values)

        def fma() -> float:
            # A pass is ten vectors here, more than a hundred in the others.
            count = 10 * self._passes
            seconds = lib.floor_fma(*pool, c_int64(count))
            return seconds / (count * threads * 10 * lib.floor_lanes())

        return dict(
            stream=stream,
            exp2=lambda: lib.floor_exp2(*pool, passes) / mapped,
            softplus=lambda: lib.floor_softplus(*pool, passes) / mapped,
            fma=fma,
        )


def floor_seconds(
    which: str,
    costs: dict[str, float],
    *,
    batch: int,
    groups: int,
    channels: int,
    length: int,
    states: int,
) -> float:
    """Seconds of the floor of one pass.

    Args:
        which: ``'forward'`` or ``'backward'``.
        costs: Seconds of a byte (``stream``) and of the operations, see
            :meth:`Floor.functions`.
        channels: Of one group.
    """
    elements = batch * groups * channels * length
    weights = batch * groups * states * length
    of_elements, of_weights = MOVED[which]
    moved = 4 * (of_elements * elements + of_weights * weights)
    arithmetic = sum(
        count * costs[name] for name, count in OPERATIONS[which](states).items()
    )
    return max(moved * costs['stream'], elements * arithmetic)
