"""Runs the CUDA kernels on the CPU, see ``emulator.h``."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from ctypes import c_int32, c_int64, c_uint64
from pathlib import Path

from mmvssm.ops.cache import cache_folder
from mmvssm.ops.cuda import kernels, nvrtc

HERE = Path(__file__).parent
TESTS = HERE.parents[1]
FLAGS = ('-std=c++17', '-O1', '-fPIC', '-shared', '-w', '-x', 'c++')
SEED_VARIABLE = 'MMVSSM_EMULATION_SEED'
COMPILER = shutil.which('c++') or shutil.which('g++')
# Stacks of its own are what Linux has.
AVAILABLE = COMPILER is not None and sys.platform.startswith('linux')


class Emulator:
    """A machine for kernels: the CPU, with one library for each set of constants."""

    devices = ('cpu',)

    def launch(self, launch, on):
        """Run a kernel to its end."""
        function = _function(launch.binary)
        seed = int(os.environ.get(SEED_VARIABLE, '0'))
        status = function(
            ctypes.byref(launch.args), launch.grid, launch.threads, launch.shared, seed
        )
        assert status == 0

    def multiprocessors(self, on):
        """Few, so that short sequences are split as long ones are on a GPU."""
        return 2

    def shared_memory(self, on):
        """As a large GPU has."""
        return kernels.SHARED_MEMORY

    def unavailable(self):
        """None: it runs on any CPU that has a compiler."""
        return None if AVAILABLE else 'there is no C++ compiler'


@functools.cache
def _function(binary):
    kernel, constants = binary
    library = ctypes.CDLL(str(_library(kernel, constants)))
    function = getattr(library, f'{kernel.entry}_emulated')
    function.argtypes = [ctypes.c_void_p, c_int64, c_int32, c_int32, c_uint64]
    return function


def _library(kernel, constants):
    """Compiled once for these sources, and kept with what else is compiled."""
    text = repr((kernel, constants, FLAGS)) + (HERE / 'emulator.h').read_text()
    name = hashlib.sha256((kernels.digest() + text).encode()).hexdigest()[:24]
    path = cache_folder() / 'emulated' / f'{name}.so'
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f'.{os.getpid()}')
        defines = [f'-D{name}={value}' for name, value in constants]
        include = [f'-I{HERE}', f'-I{nvrtc.FOLDER}']
        subprocess.run(
            [COMPILER, *FLAGS, *include, *defines, str(kernel.path), '-o', str(new)],
            check=True,
        )
        os.replace(new, path)
    return path


def run_with(program, function, *arguments):
    """Run one of this folder's programs with a function of a test module.

    Args:
        program: Name of the program, whose first two arguments are those of module
            and function.
        function: Of a module in the folder above.
        arguments: Further ones.

    Returns:
        The process, which has ended.
    """
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    module = function.__module__.rpartition('.')[2]
    return subprocess.run(
        [sys.executable, '-m', f'ops.{HERE.name}.{program}']
        + [f'ops.{module}', function.__name__, *arguments],
        cwd=TESTS,
        env=os.environ | {'PYTHONPATH': path},
        capture_output=True,
        text=True,
    )
