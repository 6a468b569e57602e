"""The allocator of a training on the CPU."""

import ctypes
import sys

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let the process keep the memory it frees, for its next tensors.

    Every iteration frees the blocks that the next one asks for again. glibc
    hands large ones back to the system each time, and getting them anew is
    paid for in page faults.

    Returns:
        Whether the C library has such a setting (glibc has).
    """
    if sys.platform != 'linux':
        return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is None:
        return False
    return all(
        (
            mallopt(_M_MMAP_MAX, 0),
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1),
            mallopt(_M_TOP_PAD, 2**27),
        )
    )
