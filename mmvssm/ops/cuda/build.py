"""Compiles the CUDA kernels with nvcc. Needs Python alone: setup.py uses it, too.

The kernels include no header of torch, so one build serves every version of
torch, and it takes seconds.

Environment variables:
    CUDACXX: The nvcc to use, instead of the one on the path, in CUDA_HOME or
        in /usr/local/cuda.
    NVCC_APPEND_FLAGS, NVCC_PREPEND_FLAGS: Further flags, read by nvcc itself.
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

# Compute capabilities to build for, where the GPU is not known. The last one
# comes as PTX, too, which the driver compiles for GPUs that are newer.
ARCHITECTURES = ('80', '90', '100')
OLDEST = 80
SOURCES = ('forward.cu', 'backward.cu')
FLAGS = ('-std=c++17', '-O3', '--threads', '0', '-Xcompiler=-fPIC,-fvisibility=hidden')
_FOLDER = Path(__file__).parent


def find_nvcc() -> str:
    """Path of nvcc.

    Raises:
        FileNotFoundError: There is none.
    """
    named = os.environ.get('CUDACXX')
    candidates = [named] if named else ['nvcc', *_usual_places()]
    for candidate in candidates:
        path = shutil.which(candidate)
        if path:
            return path
    raise FileNotFoundError(
        f"CUDACXX is '{named}', which is no program"
        if named
        else 'there is no nvcc to compile it with (put the one of the CUDA toolkit '
        'on the path, or name it in CUDACXX)'
    )


def _usual_places() -> list[str]:
    homes = (os.environ.get('CUDA_HOME'), '/usr/local/cuda')
    return [str(Path(home, 'bin', 'nvcc')) for home in homes if home]


def nvcc_version(nvcc: str) -> str:
    """Such as ``13.0.88``.

    Raises:
        RuntimeError: It does not say so.
    """
    text = _run([nvcc, '--version'])
    found = re.search(r'\bV(\d[\d.]*)', text)
    if not found:
        raise RuntimeError(f'{nvcc} --version names no version: {text.strip()}')
    return found[1]


def digest() -> str:
    """Identifies the sources and the flags."""
    found = hashlib.sha256(repr((SOURCES, FLAGS)).encode())
    for path in sorted([*_FOLDER.glob('*.cu'), *_FOLDER.glob('*.h')]):
        found.update(path.name.encode() + b'\0' + path.read_bytes() + b'\0')
    return found.hexdigest()[:16]


def compile_library(
    library: Path, nvcc: str, architectures: Sequence[str], more: Sequence[str] = ()
) -> str:
    """Compile the kernels; the library appears whole, or not at all.

    Args:
        library: Where to put it.
        nvcc: See :func:`find_nvcc`.
        architectures: Compute capabilities, ascending, without their points.
        more: Further arguments.

    Returns:
        What nvcc prints.

    Raises:
        RuntimeError: It fails.
        OSError: The folder cannot be written to.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    targets = [(f'compute_{arch}', f'sm_{arch}') for arch in architectures]
    if len(targets) > 1:
        targets.append((targets[-1][0], targets[-1][0]))
    codes = [f'-gencode=arch={virtual},code={code}' for virtual, code in targets]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        new = Path(folder, library.name)
        printed = _run(
            [nvcc, *FLAGS, *codes, f'-DMMVSSM_DIGEST={digest()}', *more, '-shared']
            + [*(str(_FOLDER / name) for name in SOURCES), '-o', str(new)]
        )
        os.replace(new, library)
    return printed


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if 'error' in line.lower()]
        reason = (lines or done.stdout.strip().splitlines() or ['no message'])[0]
        raise RuntimeError(f'{command[0]} failed: {reason.strip()}')
    return done.stdout
