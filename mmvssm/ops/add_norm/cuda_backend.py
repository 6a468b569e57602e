"""Residual addition and RMS norm by CUDA kernels, forward and backward."""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import NamedTuple

from torch import Tensor

from mmvssm.ops import backends
from mmvssm.ops.add_norm.declaration import (
    FusedNorm,
    NormInputs,
    NormOptions,
    new_gradients,
    outputs_like,
)
from mmvssm.ops.contract import Result
from mmvssm.ops.cuda import kernels
from mmvssm.ops.cuda.kernels import Kernel
from mmvssm.ops.cuda.rows import DTYPES
from mmvssm.ops.kernel_args import fields, parameter, pointer
from mmvssm.ops.typed import MaybeTensor

_FORWARD = Kernel('add_norm.cu', 'add_norm')
_BACKWARD = Kernel('add_norm.cu', 'add_norm_backward')
# Threads that may share a row. A CTA has this many at least.
_LANES = (8, 16, 32, 64, 128, 256)
_THREADS = 128
# Elements of a row that a thread may hold.
_ELEMENTS = 12
# Neighbouring ones that it loads in one piece where they are aligned.
_VECTOR = 4
# Threads of the backward kernel that a multiprocessor runs at once.
_RESIDENT = 512


class _Matrix(ctypes.Structure):
    """An array (row, channel), see ``add_norm.cu``; the stride is in bytes."""

    _fields_ = fields((c_void_p, 'data'), (c_int64, 'of_row'))

    @classmethod
    def of(cls, x: Tensor | None) -> '_Matrix':
        return cls() if x is None else cls(x.data_ptr(), x.stride(0) * x.element_size())


class _ForwardArgs(ctypes.Structure):
    _fields_ = fields(
        *((_Matrix, 'x residual total out'), (c_void_p, 'weight'), (c_int64, 'rows')),
        *((c_int32, 'channels'), (c_float, 'mean eps')),
    )


class _BackwardArgs(ctypes.Structure):
    _fields_ = fields(
        (_Matrix, 'x residual grad_out grad_total grad_x grad_residual'),
        *((c_void_p, 'weight by_weight'), (c_int64, 'rows')),
        *((c_int32, 'rows_of_cta channels'), (c_float, 'mean eps')),
    )


class _Config(NamedTuple):
    """How rows are shared out.

    Attributes:
        lanes: Threads of a row.
        held: Vectors of a row that a thread holds.
        vector: Elements that are loaded in one piece.
        whole: Whether a row's threads hold all of it.
    """

    lanes: int
    held: int
    vector: int
    whole: bool

    @classmethod
    def of(cls, *arrays: Tensor | None) -> '_Config':
        """For arrays (rows, channels) of one shape."""
        present = [x for x in arrays if x is not None]
        channels = present[0].shape[1]
        vector = _VECTOR if all(map(_in_vectors, present)) else 1
        vectors, most = -(-channels // vector), _ELEMENTS // vector
        fitting = [
            (lanes * held, lanes, held)
            for lanes in _LANES
            for held in range(1, most + 1)
            if lanes * held >= vectors
        ]
        if not fitting:
            return cls(_LANES[-1], most, vector, whole=False)
        # Few idle lanes, then few that have to wait for each other.
        _, lanes, held = min(fitting)
        return cls(lanes, held, vector, whole=True)

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return max(_THREADS, self.lanes)

    @property
    def groups(self) -> int:
        """Rows that a CTA takes at once."""
        return self.threads // self.lanes

    def constants(self, **arrays: Tensor | None) -> dict[str, int]:
        """What the kernels are compiled for, with the arrays' dtypes."""
        return dict(
            LANES=self.lanes,
            HELD=self.held,
            VECTOR=self.vector,
            WHOLE=int(self.whole),
            THREADS=self.threads,
        ) | {
            f'{name.upper()}_DTYPE': -1 if x is None else DTYPES[x.dtype]
            for name, x in arrays.items()
        }

    def shared(self, sums: int, backward: bool = False) -> int:
        """Bytes of shared memory of a CTA.

        Args:
            sums: Of a row, that its warps exchange.
            backward: Whether gradients of the weight are added up.
        """
        exchanged = 2 * self.threads // 32 * sums if self.lanes > 32 else 0
        block = self.threads * self.held * self.vector
        return 4 * max(exchanged, block if backward and self.whole else 0)


def _in_vectors(x: Tensor) -> bool:
    places = (x.data_ptr() // x.element_size(), x.stride(0), x.shape[1])
    return all(place % _VECTOR == 0 for place in places)


class CudaNorm(FusedNorm):
    """One pass over the rows each way, two over the longest."""

    supplier = backends.CUDA
    dtypes = tuple(DTYPES)

    def forward(self, inputs: NormInputs, options: NormOptions, keep: bool) -> Result:
        """See :func:`mmvssm.ops.add_rms_norm`."""
        x, residual = _rows(inputs.x), _rows(inputs.residual)
        weight = parameter(inputs.weight)
        outputs = outputs_like(inputs, options)
        out, total = (_rows(output) for output in outputs)
        config = _Config.of(x, residual, out, total)
        rows, channels = x.shape
        args = _ForwardArgs(
            x=_Matrix.of(x),
            residual=_Matrix.of(residual),
            total=_Matrix.of(total),
            out=_Matrix.of(out),
            weight=pointer(weight),
            rows=rows,
            channels=channels,
            mean=1 / channels,
            eps=options.eps,
        )
        _FORWARD.launch(
            config.constants(x=x, residual=residual, total=total),
            args,
            grid=-(-rows // config.groups),
            threads=config.threads,
            shared=config.shared(sums=1),
            on=x,
        )
        return Result(outputs, has_nan=False)

    def backward(
        self,
        inputs: NormInputs,
        options: NormOptions,
        saved: tuple[Tensor, ...],
        grads: tuple[Tensor | None, ...],
        wanted: NormInputs,
    ) -> NormInputs:
        """Gradients of the weight and of the sum; inputs are its terms, or itself."""
        found = new_gradients(inputs, options)
        x = _rows(inputs.x)
        arrays = dict(
            x=x,
            residual=_rows(inputs.residual),
            grad_out=_rows(grads[0]),
            grad_total=_rows(grads[1]),
            grad_x=_rows(found.x),
            grad_residual=_rows(found.residual),
        )
        weight = parameter(inputs.weight)
        config = _Config.of(*arrays.values())
        rows, channels = x.shape
        ctas = _RESIDENT // config.threads * kernels.multiprocessors(x)
        passes = -(-rows // (config.groups * ctas))
        ctas = -(-rows // (config.groups * passes))
        by_weight = weight.new_empty(ctas, channels)
        args = _BackwardArgs(
            **{name: _Matrix.of(x) for name, x in arrays.items()},
            weight=pointer(weight),
            by_weight=pointer(by_weight),
            rows=rows,
            rows_of_cta=passes * config.groups,
            channels=channels,
            mean=1 / channels,
            eps=options.eps,
        )
        _BACKWARD.launch(
            config.constants(**arrays),
            args,
            grid=ctas,
            threads=config.threads,
            shared=config.shared(sums=2, backward=True),
            on=x,
        )
        return found._replace(weight=by_weight.sum(0))


def _rows(x: MaybeTensor) -> MaybeTensor:
    """The tensor as (rows, channels) in a dtype that the kernels read."""
    if x is None:
        return None
    if x.dtype not in DTYPES:
        x = x.float()
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
