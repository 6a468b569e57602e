"""Loads compiled kernels and puts them onto streams, by CUDA's driver.

The driver is reached through ctypes: a binding to torch's C++ interface would have
to be compiled for each version of torch. All functions work on torch's current
device, whose context torch has made.
"""

import ctypes
import functools
import os
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p

_MAX_DYNAMIC_SHARED_SIZE = 8  # an attribute of a function


class CudaError(RuntimeError):
    """The driver refuses."""


@functools.cache
def library() -> ctypes.CDLL:
    """The driver's library.

    Raises:
        OSError: There is none.
    """
    name = 'nvcuda.dll' if os.name == 'nt' else 'libcuda.so.1'
    driver = ctypes.CDLL(name)
    unsigned = [c_uint] * 7
    driver.cuLaunchKernel.argtypes = [c_void_p, *unsigned, c_void_p, c_void_p, c_void_p]
    driver.cuModuleLoadData.argtypes = [c_void_p, c_char_p]
    driver.cuModuleGetFunction.argtypes = [c_void_p, c_void_p, c_char_p]
    driver.cuFuncSetAttribute.argtypes = [c_void_p, c_int, c_int]
    driver.cuOccupancyMaxActiveBlocksPerMultiprocessor.argtypes = [
        *(c_void_p, c_void_p, c_int, c_size_t)
    ]
    return driver


def check(status: int, what: str) -> None:
    """Turn a status of the driver into an error.

    Raises:
        CudaError: It is not success.
    """
    if status:
        text = c_char_p()
        library().cuGetErrorString(status, byref(text))
        reason = text.value.decode() if text.value else f'error {status}'
        raise CudaError(f'{what}: {reason}')


class Function:
    """A kernel on the current device, loaded for as long as the process lives.

    Args:
        code: A cubin or PTX.
        entry: The kernel's name in it.
        shared: Bytes of dynamic shared memory that a launch may ask for.

    Raises:
        CudaError: It cannot be loaded here.
    """

    def __init__(self, code: bytes, entry: str, shared: int) -> None:
        module, self._function = c_void_p(), c_void_p()
        driver = library()
        check(driver.cuModuleLoadData(byref(module), code), f'loading {entry}')
        check(
            driver.cuModuleGetFunction(byref(self._function), module, entry.encode()),
            f'finding {entry}',
        )
        self._entry, self._shared = entry, 0
        self._allow(shared)

    def _allow(self, shared: int) -> None:
        if shared > max(self._shared, 48 * 1024):
            check(
                library().cuFuncSetAttribute(
                    self._function, _MAX_DYNAMIC_SHARED_SIZE, shared
                ),
                f'{shared} bytes of shared memory for {self._entry}',
            )
        self._shared = max(self._shared, shared)

    def resident_ctas(self, threads: int, shared: int) -> int:
        """How many CTAs a multiprocessor runs at once."""
        self._allow(shared)
        found = c_int()
        check(
            library().cuOccupancyMaxActiveBlocksPerMultiprocessor(
                byref(found), self._function, threads, shared
            ),
            f'occupancy of {self._entry}',
        )
        return found.value

    def launch(
        self, grid: int, threads: int, shared: int, stream: int, args: ctypes.Structure
    ) -> None:
        """Put the kernel onto a stream; its one argument is copied at once."""
        self._allow(shared)
        parameters = (c_void_p * 1)(ctypes.addressof(args))
        status = library().cuLaunchKernel(
            *(self._function, grid, 1, 1, threads, 1, 1, shared, stream),
            *(parameters, None),
        )
        if status:
            check(status, f'launching {self._entry}')
