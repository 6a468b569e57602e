"""Builds the package and its compiled kernels.

Everything that is only metadata is in pyproject.toml. The kernels are optional:
without a C++ compiler the package is built without those for the CPU. Those for
GPUs are compiled where they run, see mmvssm/ops/cuda/nvrtc.py. Environment variables:
    MMVSSM_REQUIRE_KERNELS: 1 makes it an error if the CPU kernels cannot be compiled.
    CXX, CPPFLAGS, CFLAGS, CXXFLAGS, LDFLAGS: The compiler and further flags.
"""

import logging
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

ROOT = Path(__file__).resolve().parent
KERNELS = 'mmvssm/ops/cpu'
REQUIRED = os.environ.get('MMVSSM_REQUIRE_KERNELS', '0') not in ('', '0')

COMPILERS = ('c++', 'g++', 'clang++')
FLAGS = (
    *('-std=c++17', '-O3', '-fPIC', '-fvisibility=hidden', '-Wno-psabi'),
    *('-fno-math-errno', '-fno-exceptions', '-fno-rtti'),
)
# What each instruction set of x86-64 needs beyond those before it.
X86_ISAS = {
    'baseline': ('-march=x86-64',),
    'avx2': ('-mavx2', '-mfma'),
    'avx512': ('-mavx512f', '-mavx512bw', '-mavx512dq', '-mavx512vl'),
}


def fill_mim_folder() -> None:
    """Replace git's stand-ins for the links in ``mmvssm/.mim`` by copies.

    OpenMMLab's tools look for configs and scripts inside the package, so
    ``mmvssm/.mim`` links to them. A checkout without symbolic links (Windows,
    by default) has small text files holding the link's target instead.
    """
    for link in (ROOT / 'mmvssm' / '.mim').iterdir():
        if link.is_symlink() or not link.is_file():
            continue
        source = ROOT / link.name
        if link.read_text(encoding='utf-8').strip() != f'../../{link.name}':
            continue
        link.unlink()
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, link)


def kernels() -> list[Extension]:
    """The library of CPU kernels, where the compilers can build it."""
    if sys.platform == 'win32':
        # The sources use vector types that Microsoft's compiler does not know.
        return []
    folder = ROOT / KERNELS
    return [
        Extension(
            'mmvssm.ops.cpu._kernels',
            sources=[f'{KERNELS}/{path.name}' for path in sorted(folder.glob('*.cpp'))],
            depends=[
                *(f'{KERNELS}/{path.name}' for path in sorted(folder.glob('*.h'))),
                'setup.py',
            ],
            optional=not REQUIRED,
        )
    ]


class BuildKernels(build_ext):
    """Compiles kernels.cpp once for each instruction set into one library.

    It is loaded by ctypes and has nothing of Python in it. So Python's own compiler
    and flags stay out of it, too: they may name an instruction set, or a compiler
    that exists only where Python was built.
    """

    def run(self) -> None:
        if self.inplace:
            # If compiling fails, no library of older sources may stay behind.
            for library in (ROOT / KERNELS).glob('_kernels*.so'):
                library.unlink()
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace('.', os.sep) + '.so'

    def get_output_mapping(self) -> dict[str, str]:
        # A strict editable install links these; a failure leaves none.
        mapping = super().get_output_mapping()
        return {to: file for to, file in mapping.items() if Path(file).exists()}

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        if not self.force and not newer_group(ext.sources + ext.depends, str(library)):
            return
        library.unlink(missing_ok=True)
        try:
            self.compile_and_link(ext, library)
        except (OSError, subprocess.SubprocessError) as error:
            raise CompileError(
                f'{error}\n'
                'Without its compiled kernels mmvssm scans on the CPU in plain torch '
                'code, many times slower. To have them put g++ or clang++ on the path, '
                'or name a compiler in CXX, and install mmvssm again (pip install '
                '--force-reinstall --no-deps --no-cache-dir).'
            ) from error

    def compile_and_link(self, ext: Extension, library: Path) -> None:
        """Compile the objects, at once where there are cores, and link them.

        Raises:
            OSError: There is no compiler.
            SubprocessError: It failed.
        """
        command = [
            *(from_environment('CXX') or [find_compiler()]),
            *FLAGS,
            *from_environment('CPPFLAGS', 'CFLAGS', 'CXXFLAGS'),
        ]
        objects = Path(self.build_temp).resolve() / 'kernels'
        objects.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        source = f'{KERNELS}/kernels.cpp'
        compilations = [
            ['-c', f'{KERNELS}/{name}.cpp', '-o', str(objects / f'{name}.o')]
            for name in ('entry', 'onnx_library')
        ]
        for isa, flags in isas(command).items():
            output = str(objects / f'{isa}.o')
            # The flags of the instruction set come last: -march=native among
            # the user's must not raise the baseline.
            compilations.append(
                [*flags, f'-DMMVSSM_ISA={isa}', '-c', source, '-o', output]
            )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # The widest instruction set takes longest, so it starts first.
            list(pool.map(lambda more: execute(command + more), compilations[::-1]))
        linked = [arguments[-1] for arguments in compilations]
        execute(
            [*command, '-shared', *linked, '-o', str(library)]
            + from_environment('LDFLAGS')
        )


class BuildWheel(bdist_wheel):
    """Tags the wheel for any Python: only the platform matters to the library."""

    def get_tag(self) -> tuple[str, str, str]:
        return ('py3', 'none', super().get_tag()[2])


def from_environment(*names: str) -> list[str]:
    """The words of environment variables, without ``-O2``.

    Distributions set -O2 for all they build; the kernels lose up to 1.7 times
    their speed by it.
    """
    words = (shlex.split(os.environ.get(name, '')) for name in names)
    return [word for word in chain.from_iterable(words) if word != '-O2']


def find_compiler() -> str:
    """The first C++ compiler on the path."""
    for name in COMPILERS:
        if shutil.which(name):
            return name
    raise FileNotFoundError(f'there is no C++ compiler ({", ".join(COMPILERS)})')


def isas(command: list[str]) -> dict[str, tuple[str, ...]]:
    """Instruction sets to compile for -> flags, by what the compiler targets."""
    macros = execute([*command, '-dM', '-E', '-x', 'c++', os.devnull])
    if '#define __x86_64__' not in macros:
        return {'baseline': ()}
    found, flags = {}, ()
    for isa, more in X86_ISAS.items():
        flags += more
        found[isa] = flags
    return found


def execute(command: list[str]) -> str:
    """Run a command and return what it prints; its errors are shown."""
    logging.info(shlex.join(command))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise subprocess.SubprocessError(
            f'{command[0]} failed (its messages are above): {shlex.join(command)}'
        )
    return done.stdout


fill_mim_folder()
setup(
    ext_modules=kernels(),
    cmdclass={'build_ext': BuildKernels, 'bdist_wheel': BuildWheel},
)
