"""Compiled kernels without a GPU: NVIDIA's programs that read them, resources."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path


def program(name: str) -> Path:
    """nvdisasm or cuobjdump, of the package nvidia-cuda-NAME.

    Raises:
        FileNotFoundError: It is not installed.
    """
    spec = importlib.util.find_spec('nvidia')
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob(f'*/bin/{name}'), reverse=True):
            return path
    raise FileNotFoundError(f'{name} is not installed (pip install nvidia-cuda-{name})')


def version(name: str) -> str:
    """Such as 13.0.85."""
    said = _run(name, '--version')
    found = re.search(r'\bV(\d[\d.]*)', said)
    return found[1] if found else said.strip().rpartition('\n')[2]


def _run(name: str, *arguments: str) -> str:
    command = [str(program(name)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'{name}: {done.stderr.strip() or done.stdout.strip()}')
    return done.stdout


def disassemble(path: Path) -> str:
    """The machine code, with encodings and the lines of the source."""
    return _run('nvdisasm', '-c', '-hex', '-gi', str(path))


@dataclass(frozen=True)
class Resources:
    """What a kernel takes."""

    registers: int
    stack: int
    shared: int  # bytes that are not asked for at the launch

    def resident_warps(self, threads: int, dynamic: int) -> int:
        """Warps that a multiprocessor of sm_90 holds at once.

        Args:
            threads: Of a CTA.
            dynamic: Bytes of shared memory that a launch asks for.
        """
        warps = -(-threads // 32)
        # Each quarter of a multiprocessor has 16,384 registers, given to a warp by
        # 256. Shared memory is given by 128 bytes, of 228 KB; every CTA takes 1 KB
        # besides its own, which cuobjdump counts where there is any.
        quarter = 16384 // (-(-self.registers * 32 // 256) * 256)
        shared = -(-(max(self.shared, 1024) + dynamic) // 128) * 128
        ctas = min(4 * quarter // warps, 228 * 1024 // shared, 2048 // threads, 32)
        return ctas * warps


def resources(path: Path) -> dict[str, Resources]:
    """What each kernel of a cubin takes, by its name."""
    found, name = {}, ''
    for line in _run('cuobjdump', '-res-usage', str(path)).splitlines():
        if function := re.match(r'\s*Function (.*):$', line):
            name = function[1]
        elif 'REG:' in line:
            number = {x.split(':')[0]: int(x.split(':')[1]) for x in line.split()}
            found[name] = Resources(
                number['REG'], number['STACK'] + number['LOCAL'], number['SHARED']
            )
    return found
