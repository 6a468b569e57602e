"""Tensors between pages of memory that nobody may touch.

A kernel that reads beyond its arrays ends the process. So such tests are run by this
file as a program.
"""

import ctypes
import importlib
import mmap
import sys

import torch

from mmvssm.ops.cuda import kernels

from . import Emulator, run_with

_NOTHING = 0  # PROT_NONE
_kept = []


def guarded(x, at_end):
    """A copy of a contiguous tensor that fills memory up to its end, or from its start.

    Args:
        x: The tensor.
        at_end: Whether it ends where the page does behind which it is forbidden to
            read; otherwise it begins where one begins that has such a page before it.
    """
    size = x.numel() * x.itemsize
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + 2 * mmap.PAGESIZE)
    _kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for page in (start, start + mmap.PAGESIZE + room):
        address = ctypes.c_void_p(page)
        assert libc.mprotect(address, ctypes.c_size_t(mmap.PAGESIZE), _NOTHING) == 0
    offset = mmap.PAGESIZE + (room - size if at_end else 0)
    found = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset)
    return found.view(x.shape).copy_(x)


def stays_inside(function):
    """Whether a function of a test module touches only what it may.

    Args:
        function: It is called with True and False, see :func:`guarded`.
    """
    done = run_with('guarded', function)
    assert done.stdout.startswith('begins'), done.stdout + done.stderr
    return done.stdout.endswith('ends\n')


def main():
    module, function = sys.argv[1:]
    run = getattr(importlib.import_module(module), function)
    with kernels.use_machine(Emulator()):
        for at_end in (True, False):
            print('begins', flush=True)
            run(at_end)
    print('ends', flush=True)


if __name__ == '__main__':
    main()
