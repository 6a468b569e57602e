"""The kernel's counters of the memory that this process holds (Linux)."""

from pathlib import Path

STATUS = Path('/proc/self/status')
RESET = Path('/proc/self/clear_refs')


def possible() -> bool:
    """Whether this system has the counters."""
    return STATUS.exists() and RESET.exists()


def held() -> int:
    """Bytes held now."""
    return _bytes('VmRSS')


def peak() -> int:
    """Most bytes held since the start or the last :func:`reset_peak`.

    ``ru_maxrss`` would not do: a process inherits that of its parent.
    """
    return _bytes('VmHWM')


def reset_peak() -> None:
    """Let the peak start anew at what is held now."""
    RESET.write_text('5')


def _bytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f'{field}:'):
            return 1024 * int(line.split()[1])
    raise KeyError(field)
