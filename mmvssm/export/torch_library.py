"""The ops of this package for programs of torch without Python."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from mmvssm.export.errors import ExportError
from mmvssm.ops.cpu import library
from mmvssm.ops.operator import all_ops

# The oldest torch that has all of the stable interface that is used.
_OLDEST = '0x020a000000000000'
_OURS = ('linear', 'add_rms_norm', 'selective_scan', 'ss2d_scan')
_OURS += ('bidirectional_scan', 'linear_attention')
_NAME = 'libmmvssm_torch.so'


def torch_library(folder: str | Path) -> str:
    """Compile a library with which programs of torch run our ops without Python.

    A C++ program loads it with ``dlopen`` before a package of AOTInductor, or is linked
    with it. The ops run the compiled CPU kernels, in float32, for inference. The
    library needs torch 2.10 or newer, and the copy of the kernels beside it; both files
    can be moved together to another machine of the same kind. Python does not need it.

    Args:
        folder: Where the two files are written.

    Returns:
        Path of the library.

    Raises:
        ExportError: There is no C++ compiler (``g++``, or what ``CXX`` names), it
            failed, the system is not Linux, torch is older, or the kernels were not
            compiled when mmvssm was installed.
    """
    reason = library.unavailable()
    if reason is not None:
        raise ExportError(f"mmvssm's kernels cannot be used: {reason}")
    if not library.is_threaded():
        raise ExportError(
            f'the library needs torch 2.10 or newer, this is {torch.__version__}'
        )
    compiler = os.environ.get('CXX') or 'g++'
    if sys.platform != 'linux' or shutil.which(compiler) is None:
        raise ExportError(
            f'the library is compiled on Linux with {compiler}, which is not there: '
            'install it, or name another C++ compiler by the environment variable CXX'
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kernels = folder / Path(library.path()).name
    shutil.copyfile(library.path(), kernels)
    root = Path(torch.__file__).parent
    include = root / 'include'
    source = Path(__file__).with_suffix('.cpp')
    with tempfile.TemporaryDirectory() as made:
        Path(made, 'torch_schemas.h').write_text(_schemas())
        command = [
            *(compiler, '-std=c++20', '-O2', '-fPIC', '-shared', '-w'),
            f'-DTORCH_TARGET_VERSION={_OLDEST}',
            *(f'-I{made}', f'-I{Path(library.__file__).parent}'),
            *(f'-I{include}', f'-I{include}/torch/csrc/api/include'),
            *(str(source), '-o', str(folder / _NAME)),
            *(f'-L{folder}', f'-l:{kernels.name}', '-Wl,-rpath,$ORIGIN'),
            *(f'-L{root}/lib', '-Wl,--no-as-needed', '-ltorch_cpu', '-lc10'),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if 'error' in line]
        raise ExportError(
            f'{compiler} could not compile the library: '
            f'{(lines or done.stderr.splitlines() or ["it says nothing"])[0]}'
        )
    return str(folder / _NAME)


def _schemas() -> str:
    """The declarations of the ops, as C++ with a macro."""
    schemas = (str(all_ops[name].torch_op._schema) for name in _OURS)
    return ''.join(
        f'MMVSSM_SCHEMA("{schema.removeprefix("mmvssm::")}")\n' for schema in schemas
    )
