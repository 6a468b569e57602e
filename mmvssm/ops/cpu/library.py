"""Loads the compiled CPU kernels and calls them.

The library does not use torch's C++ interface, so one build serves every version
of torch and of Python. It only needs torch's thread pool: a function of torch's
stable C interface, which each call passes on (torch >= 2.10; with older versions
the kernels run on one thread). It is also a library of operators for onnxruntime:
:func:`mmvssm.onnx_library`.

Environment variables, read when the library is first used:
    MMVSSM_CPU_ISA: ``avx512``, ``avx2`` or ``baseline`` instead of the best
        instruction set of this machine.
    MMVSSM_CPU_LIBRARY: Path of another build of the library.
"""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmvssm.ops import kernel_args
from mmvssm.ops.kernel_args import fields
from mmvssm.ops.typed import assume_constant_result

ISA_VARIABLE = 'MMVSSM_CPU_ISA'
LIBRARY_VARIABLE = 'MMVSSM_CPU_LIBRARY'
# The index of each is its number in entry.cpp.
_ISAS = ('baseline', 'avx2', 'avx512')
_DONE, _FOUND_NAN, _OUT_OF_MEMORY = range(3)
_forced: list[str] = []


class Array(kernel_args.Array):
    """A tensor of up to four axes, as in kernel_args.h."""

    dtypes: ClassVar[dict[torch.dtype, int]] = {torch.float32: 0, torch.bfloat16: 1}

    @classmethod
    def from_end(cls, x: Tensor) -> 'Array':
        """The array of a tensor, its last axis reversed."""
        last = x[..., -1]
        return cls(
            last.data_ptr(), cls.dtypes[x.dtype], (*last.stride(), -x.stride(-1))
        )


class ScanArgs(ctypes.Structure):
    """Args of a selective scan and of its backward pass."""

    _fields_ = fields(
        (c_int64, 'batch channels length states groups softplus'),
        (Array, 'u delta z B C'),
        (c_void_p, 'A D bias'),
        (Array, 'out'),
        (c_void_p, 'last_state saved'),
        (Array, 'grad_out'),
        (c_void_p, 'grad_last_state'),
        (Array, 'grad_u grad_delta grad_z'),
        (c_void_p, 'grad_B grad_C grad_A grad_D grad_bias'),
    )


class Ss2dArgs(ctypes.Structure):
    """Args of ss2d_scan and of its backward pass."""

    _fields_ = fields(
        (c_int64, 'batch channels height width states rank orders positions'),
        (POINTER(c_int32), 'routes'),
        (c_void_p, 'table x projected'),
        (c_int64, 'projected_stride'),
        (c_void_p, 'dt_weight dt_bias A D out saved grad_out grad_x grad_projected'),
        (c_void_p, 'grad_dt_weight grad_dt_bias grad_A grad_D'),
    )


class PairArgs(ctypes.Structure):
    """Args of the scans of both directions."""

    _fields_ = fields((ScanArgs * 2, 'directions'))


class ConvDirection(ctypes.Structure):
    """What the convolution of one direction has of its own."""

    _fields_ = fields(
        (c_void_p, 'weight bias'),
        (Array, 'out grad_scan grad_rest'),
        (c_void_p, 'grad_weight grad_bias'),
    )


class ConvArgs(ctypes.Structure):
    """Args of the convolutions of both directions."""

    _fields_ = fields(
        (c_int64, 'batch channels length taps'),
        (Array, 'x grad_x'),
        (ConvDirection * 2, 'directions'),
    )


class GateArgs(ctypes.Structure):
    """Args of the sum of both directions and its gate."""

    _fields_ = fields(
        (c_int64, 'batch channels length'),
        (c_float, 'scale'),
        (Array, 'y y_from_end z out grad_out grad_y grad_z'),
    )


class NormArgs(ctypes.Structure):
    """Args of residual addition and RMS norm."""

    _fields_ = fields(
        (c_int64, 'rows channels'),
        (c_float, 'eps'),
        (Array, 'x residual total out'),
        (c_void_p, 'weight'),
        (Array, 'grad_out grad_total grad_x grad_residual'),
        (c_void_p, 'grad_weight'),
    )


class AttentionArgs(ctypes.Structure):
    """Args of linear attention and of its backward pass."""

    _fields_ = fields(
        (c_int64, 'batch heads length keys values normalise'),
        (c_float, 'eps'),
        (Array, 'q k v out'),
        (c_void_p, 'cosine sine sums grad_sums'),
        (Array, 'grad_out grad_q grad_k grad_v'),
        (c_void_p, 'parts'),
    )


def path() -> str:
    """Path of the library.

    Raises:
        OSError: It was not compiled.
    """
    given = os.environ.get(LIBRARY_VARIABLE)
    if given is not None:
        return given
    here = Path(__file__).parent
    found = sorted(here.glob('_kernels*.so')) + sorted(here.glob('_kernels*.pyd'))
    if not found:
        raise OSError(
            'it was not compiled when mmvssm was installed (there was no C++ compiler, '
            'or it failed); put g++ or clang++ on the path and install mmvssm again'
        )
    return str(found[0])


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(path())
    by_name = {
        'scan': ScanArgs,
        'ss2d': Ss2dArgs,
        'pair': PairArgs,
        'conv': ConvArgs,
        'gate': GateArgs,
        'norm': NormArgs,
        'attention': AttentionArgs,
    }
    for name, expected in by_name.items():
        size = getattr(library, f'mmvssm_{name}_args_size', lambda: None)
        if size() != ctypes.sizeof(expected):
            raise OSError(_built_from_others())
    return library


def _built_from_others() -> str:
    return (
        f'{path()} was built from the sources of another version; install mmvssm again'
    )


@cache
def parallel_for() -> c_void_p:
    """Address of torch's parallel_for; null where torch does not export it."""
    folder = Path(torch.__file__).parent / 'lib'
    for name in ('libtorch_cpu.so', 'libtorch_cpu.dylib', 'torch_cpu.dll'):
        if (folder / name).exists():
            function = getattr(
                ctypes.CDLL(str(folder / name)), 'torch_parallel_for', None
            )
            return c_void_p() if function is None else ctypes.cast(function, c_void_p)
    return c_void_p()


# torch.compile calls it once and does not trace into it.
@assume_constant_result
def unavailable() -> str | None:
    """Why the kernels cannot run here, or None."""
    try:
        isa()
    except (OSError, ValueError) as error:
        return str(error)
    return None


def no_onnx_operators() -> str | None:
    """Why the library is not one of operators for onnxruntime, or None."""
    reason = unavailable()
    if reason is None and not hasattr(_library(), 'RegisterCustomOps'):
        reason = _built_from_others()
    return reason


def is_threaded() -> bool:
    """Whether the kernels run on torch's threads; if not, they run on one thread."""
    return parallel_for().value is not None


def available_isas() -> list[str]:
    """Instruction sets that both the library and this machine have, best first."""
    return [
        name
        for number, name in reversed(list(enumerate(_ISAS)))
        if _library().mmvssm_lanes(number)
    ]


def isa() -> str:
    """The instruction set in use.

    Raises:
        OSError: The library is missing or cannot be loaded.
        ValueError: ``MMVSSM_CPU_ISA`` is not one of :func:`available_isas`.
    """
    return _forced[-1] if _forced else _default_isa()


@cache
def _default_isa() -> str:
    name = os.environ.get(ISA_VARIABLE)
    if name:
        _check_isa(name)
        return name
    return available_isas()[0]


def _check_isa(name: str) -> None:
    if name not in available_isas():
        raise ValueError(
            f"instruction set '{name}' is not available; there are {available_isas()}"
        )


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the kernels of one instruction set inside the ``with`` block.

    Args:
        name: One of :func:`available_isas`.

    Raises:
        ValueError: This machine does not have it.
    """
    _check_isa(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def lanes() -> int:
    """How many float32 numbers a vector of the instruction set in use holds."""
    return int(_library().mmvssm_lanes(_ISAS.index(isa())))


@cache
def chunk_length() -> int:
    """Positions of a chunk: those between two saved states."""
    _library().mmvssm_chunk_length.restype = c_int64
    return int(_library().mmvssm_chunk_length())


@cache
def norm_rows() -> int:
    """Rows of a row block of add_rms_norm; each gives one sum for the weight."""
    _library().mmvssm_norm_rows.restype = c_int64
    return int(_library().mmvssm_norm_rows())


@cache
def panel_columns() -> int:
    """Columns of a panel, of which linear attention makes its matrices."""
    _library().mmvssm_panel_columns.restype = c_int64
    return int(_library().mmvssm_panel_columns())


def channel_blocks(channels: int) -> int:
    """How many channel blocks the kernels cut channels into; we sum over them."""
    _library().mmvssm_channel_blocks.restype = c_int64
    isa_number = c_int32(_ISAS.index(isa()))
    return int(_library().mmvssm_channel_blocks(isa_number, c_int64(channels)))


def kernel(function: str) -> Callable[..., bool]:
    """A kernel: a function of a pointer to its args and of :func:`parallel_for`.

    The function returns whether a forward kernel found NaN. It raises MemoryError
    if there is no memory for the kernel's buffers.

    Args:
        function: Name of the kernel in entry.cpp, without ``mmvssm_``.
    """
    return partial(_kernel(function), _ISAS.index(isa()))


@cache
def _kernel(function: str) -> Any:
    found = getattr(_library(), f'mmvssm_{function}')
    found.argtypes = (c_int32, c_void_p, c_void_p)
    found.restype = c_int32
    found.errcheck = _found_nan
    return found


def _found_nan(status: int, function: Any, arguments: tuple[Any, ...]) -> bool:
    if status == _OUT_OF_MEMORY:
        raise MemoryError('the compiled kernel found no memory for its buffers')
    return status == _FOUND_NAN
