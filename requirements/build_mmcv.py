"""Compile a wheel of mmcv with its ops, in a quarter of the time `pip wheel` takes.

    python requirements/build_mmcv.py FOLDER REQUIREMENT [option of pip ...]

Nearly all of that time the compiler reads torch's headers, once for each of mmcv's
78 sources. 58 of them are short and go together, so here they are compiled as two;
what is compiled is the same. Debug information, which nobody looks at, is left out.

A finished wheel is kept for the next time, in the folder MMVSSM_CACHE_DIR, by
default `mmvssm` in XDG_CACHE_HOME or in ~/.cache. Where pip finds a wheel of mmcv,
that is taken.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

import torch

# Sources that only hand their arguments on, relative to mmcv's folder.
_SOURCES = 'mmcv/ops/csrc/pytorch'
_JOINED = 2


def wheels_at(requirement: str) -> Path:
    """Where wheels are kept: compiled ops serve one torch and one Python."""
    parent = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    cache = os.environ.get('MMVSSM_CACHE_DIR') or Path(parent, 'mmvssm')
    built_for = [requirement, f'torch-{torch.__version__}', sysconfig.get_platform()]
    return Path(cache, 'wheels', *built_for, platform.python_version())


def join_sources(folder: Path) -> None:
    """Put the many short sources into a few files that include them."""
    sources = sorted(folder.glob('*.cpp'))
    for number in range(_JOINED):
        lines = ['#include "pytorch_cpp_helper.hpp"']
        for source in sources[number::_JOINED]:
            source = source.rename(source.with_suffix('.inc'))
            # Some define these as macros, which is no good to the one behind.
            lines += [f'#include "{source.name}"', '#undef min', '#undef max']
        (folder / f'joined_{number}.cpp').write_text('\n'.join(lines) + '\n')


def pip(*arguments: str | Path, **environment: str) -> None:
    """Run pip; what fails ends the program with pip's exit code."""
    command = [sys.executable, '-m', 'pip', *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **environment})
    if done.returncode:
        sys.exit(done.returncode)


def build(requirement: str, options: list[str], wheels: Path) -> None:
    """Leave a wheel in the folder ``wheels``."""
    flags = ('--no-deps', '--no-build-isolation', *options)
    with tempfile.TemporaryDirectory() as temporary:
        pip('download', *flags, '-d', temporary, requirement, MMCV_WITH_OPS='1')
        (found,) = Path(temporary).iterdir()
        if found.suffix == '.whl':
            shutil.move(found, wheels)
            return
        with tarfile.open(found) as archive:
            archive.extractall(temporary, filter='data')
        found.unlink()
        (source,) = Path(temporary).iterdir()
        join_sources(source / _SOURCES)
        cflags = f'{os.environ.get("CFLAGS", "")} -g0'
        pip('wheel', *flags, '-w', wheels, source, MMCV_WITH_OPS='1', CFLAGS=cflags)


def main(folder: str, requirement: str, *options: str) -> None:
    """Put the wheel into a folder, built or kept from before."""
    kept = wheels_at(requirement)
    if not list(kept.glob('*.whl')):
        kept.mkdir(parents=True, exist_ok=True)
        build(requirement, list(options), kept)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for wheel in kept.glob('*.whl'):
        print(f'{wheel.name}, kept in {kept}')
        shutil.copy(wheel, folder)


if __name__ == '__main__':
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
