"""Compiles CUDA C++ by NVRTC, the compiler that torch's CUDA wheels bring along.

Neither nvcc nor CUDA's headers are needed, nor is a GPU. Run as a script, it
compiles a list of kernels in a process of its own and imports nothing but Python.
"""

import ctypes
import functools
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# Lines of the source cost nothing, and profilers show them.
OPTIONS = ('-std=c++17', '--generate-line-info', f'--include-path={FOLDER}')
_NAMES = ('nvrtc64_*.dll',) if os.name == 'nt' else ('libnvrtc.so.*', 'libnvrtc-*.so*')
# Names of the folders in NVIDIA's packages, of the newest first.
_PACKAGES = ('cu1?/lib', 'cu1?/bin/x86_64', 'cuda_nvrtc/lib', 'cuda_nvrtc/bin')


class CompileError(RuntimeError):
    """NVRTC refuses a source."""


def find_library(major: str | None = None) -> str | None:
    """Path or name of NVRTC, or None.

    Args:
        major: The CUDA version to look for first, such as ``'13'``.
    """
    found = [str(path) for path in _candidates()]
    # One that fits torch's own CUDA is loaded already, or will be.
    found.sort(key=lambda path: f'.{major}' not in path and f'cu{major}' not in path)
    usual = [f'libnvrtc.so.{major}'] if major and os.name != 'nt' else []
    for path in [*found, *usual]:
        try:
            ctypes.CDLL(path)
        except OSError:
            continue
        return path
    return None


def _candidates() -> Iterator[Path]:
    folders: list[Path] = []
    for package, patterns in (('nvidia', _PACKAGES), ('torch', ('lib',))):
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            for pattern in patterns:
                folders += sorted(Path(place).glob(pattern), reverse=True)
    for folder in folders:
        for name in _NAMES:
            for path in sorted(folder.glob(name)):
                if 'builtins' not in path.name and '.alt.' not in path.name:
                    yield path


class Nvrtc:
    """The library.

    Args:
        path: See :func:`find_library`.

    Attributes:
        path: As given.

    Raises:
        OSError: It cannot be loaded.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        # NVRTC looks for its other half where the system does, which need not be
        # where it lies itself; loaded already, it is found.
        for other in sorted(Path(path).parent.glob('*nvrtc-builtins*')):
            if '.alt.' not in other.name:
                ctypes.CDLL(str(other))
        self._library = ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = c_char_p

    @functools.cached_property
    def version(self) -> str:
        """Such as ``13.0``."""
        major, minor = c_int(), c_int()
        self._call('nvrtcVersion', byref(major), byref(minor))
        return f'{major.value}.{minor.value}'

    def architecture(self, capability: int) -> str:
        """What to compile for: the GPU's own code, or what its driver can compile.

        Args:
            capability: Compute capability without its point, such as 90.

        Raises:
            CompileError: It is older than all that NVRTC knows.
        """
        count = c_int()
        self._call('nvrtcGetNumSupportedArchs', byref(count))
        known = (c_int * count.value)()
        self._call('nvrtcGetSupportedArchs', known)
        if capability in known:
            return f'sm_{capability}'
        older = [k for k in known if k <= capability]
        if not older:
            raise CompileError(f'NVRTC {self.version} knows no GPU as old as this')
        return f'compute_{max(older)}'

    def compile(
        self, source: Path, constants: Mapping[str, int], architecture: str
    ) -> bytes:
        """Compile a file.

        Args:
            source: The file; it may include those of this folder.
            constants: Macros.
            architecture: ``sm_90`` for a cubin, ``compute_90`` for PTX.

        Returns:
            What the driver loads.

        Raises:
            CompileError: With the first line of what NVRTC says.
        """
        program = c_void_p()
        text = source.read_bytes()
        name = source.name.encode()
        self._call('nvrtcCreateProgram', byref(program), text, name, 0, None, None)
        try:
            defines = [f'-D{name}={value}' for name, value in constants.items()]
            options = [*OPTIONS, f'--gpu-architecture={architecture}', *defines]
            encoded = (c_char_p * len(options))(*(o.encode() for o in options))
            status = self._library.nvrtcCompileProgram(program, len(options), encoded)
            if status:
                log = self._bytes(program, 'ProgramLog').decode(errors='replace')
                raise CompileError(_first_error(log) or self._reason(status))
            kind = 'CUBIN' if architecture.startswith('sm_') else 'PTX'
            return self._bytes(program, kind)
        finally:
            self._library.nvrtcDestroyProgram(byref(program))

    def _bytes(self, program: c_void_p, kind: str) -> bytes:
        size = c_size_t()
        self._call(f'nvrtcGet{kind}Size', program, byref(size))
        data = ctypes.create_string_buffer(size.value)
        self._call(f'nvrtcGet{kind}', program, data)
        return data.raw

    def _call(self, name: str, *arguments: object) -> None:
        function = getattr(self._library, name)
        function.argtypes = _ARGUMENTS.get(name)
        status = function(*arguments)
        if status:
            raise CompileError(f'{name}: {self._reason(status)}')

    def _reason(self, status: int) -> str:
        text: bytes = self._library.nvrtcGetErrorString(status)
        return text.decode()


_ARGUMENTS: dict[str, list[object]] = {
    'nvrtcCreateProgram': [c_void_p, c_char_p, c_char_p, c_int, c_void_p, c_void_p],
    **{
        f'nvrtcGet{kind}Size': [c_void_p, POINTER(c_size_t)]
        for kind in ('ProgramLog', 'CUBIN', 'PTX')
    },
    **{f'nvrtcGet{kind}': [c_void_p, c_char_p] for kind in ('ProgramLog', 'CUBIN')},
}


def _first_error(log: str) -> str:
    found = re.search(r'^.*\berror\b.*$', log, re.MULTILINE)
    return found[0].strip() if found else log.strip().partition('\n')[0]


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that others see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f'{path.name}.{os.getpid()}')
    new.write_bytes(data)
    os.replace(new, path)


def main() -> None:
    """Compile what a JSON list on standard input says; arguments: the library.

    Each item is ``[source, constants, architecture, path]``; what is there is left.
    """
    tasks = json.load(sys.stdin)
    try:
        compiler = Nvrtc(sys.argv[1])
        for source, constants, architecture, path in tasks:
            if not Path(path).exists():
                code = compiler.compile(Path(source), constants, architecture)
                write_whole(Path(path), code)
    except (CompileError, OSError) as error:
        sys.exit(str(error))


if __name__ == '__main__':
    main()
