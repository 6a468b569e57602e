"""The kernel's counters of the memory that this process holds (Linux)."""

import ctypes
from pathlib import Path

STATUS = Path('/proc/self/status')
RESET = Path('/proc/self/clear_refs')
# Parameter of glibc's mallopt(3).
_M_MMAP_THRESHOLD = -3


def possible() -> bool:
    """Whether this system has the counters."""
    return STATUS.exists() and RESET.exists()


def held() -> int:
    """Bytes held now."""
    return _bytes('VmRSS')


def data() -> int:
    """Bytes that count towards the limit RLIMIT_DATA."""
    return _bytes('VmData')


def peak() -> int:
    """Most bytes held since the start or the last :func:`reset_peak`.

    ``ru_maxrss`` would not do: a process inherits that of its parent.
    """
    return _bytes('VmHWM')


def reset_peak() -> None:
    """Let the peak start anew at what is held now."""
    RESET.write_text('5')


def give_back() -> None:
    """Hand memory that is free in the C library (glibc) back to the system."""
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
        trim(0)


def hold_only_what_lives() -> None:
    """Let the C library (glibc) hand back every tensor as soon as it is freed.

    What is held is then what is alive. Otherwise it depends on what was freed before.
    """
    give_back()
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**16)


def available() -> int:
    """Bytes that new processes can have, at most the limit of a container."""
    found = [_field(Path('/proc/meminfo'), 'MemAvailable')]
    for limit in ('memory.max', 'memory/memory.limit_in_bytes'):
        file = Path('/sys/fs/cgroup', limit)
        if file.exists() and file.read_text().strip() != 'max':
            found.append(int(file.read_text()))
    return min(found)


def _bytes(field: str) -> int:
    return _field(STATUS, field)


def _field(file: Path, field: str) -> int:
    for line in file.read_text().splitlines():
        if line.startswith(f'{field}:'):
            return 1024 * int(line.split()[1])
    raise KeyError(field)
