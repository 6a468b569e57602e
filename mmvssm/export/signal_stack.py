"""The stack on which a thread of Linux handles signals."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class SignalStack(ctypes.Structure):
    """Linux's ``stack_t``: the stack on which a thread handles signals."""

    _fields_ = [
        ('pointer', ctypes.c_void_p),
        ('flags', ctypes.c_int),
        ('size', ctypes.c_size_t),
    ]

    @classmethod
    def of_this_thread(cls) -> 'SignalStack':
        """The one that is set; its flags are 2 if there is none."""
        found = cls()
        ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
        return found


@contextmanager
def same_signal_stack() -> Iterator[None]:
    """Put back the signal stack, which OpenVINO replaces by memory of its own.

    Once that memory is gone the next signal, such as SIGTERM, would end the process
    whatever its handler.
    """
    if sys.platform != 'linux':
        yield
        return
    before = SignalStack.of_this_thread()
    try:
        yield
    finally:
        ctypes.CDLL(None).sigaltstack(ctypes.byref(before), None)
