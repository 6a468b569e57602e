"""Linear attention by own CUDA kernels, forward and backward.

The sums over the keys are taken by as many CTAs as fill the GPU, each of a split of the
positions; then the queries read them, in a second launch. A single launch does both
where the heads of a batch fill the GPU by themselves, or the sequence is short. The
gradients are taken in the same way: by the queries those of the sums, from them those
of keys and values. See ``mmvssm/ops/cuda/linear_attention.h``.
"""

import ctypes
from collections.abc import Iterable
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from mmvssm.ops import backends
from mmvssm.ops.contract import KernelBackend, Outputs, Result
from mmvssm.ops.cuda import kernels
from mmvssm.ops.cuda.kernels import Kernel
from mmvssm.ops.kernel_args import Array, fields, pointer, readable
from mmvssm.ops.linear_attention.declaration import (
    AttentionInputs,
    AttentionOptions,
)

FORWARD = Kernel('linear_attention_forward.cu', 'linear_attention_forward')
BACKWARD = Kernel('linear_attention_backward.cu', 'linear_attention_backward')

# Channels of a head are worked on in blocks. More than two blocks of either kind would
# need more shared memory than GPUs have.
_BLOCK = 32
_MOST_CHANNELS = 64
_THREADS = 128
_WARPS = _THREADS // 32
_POSITIONS = 64  # of a CTA at once
_ROWS = _POSITIONS // _WARPS
# A sequence as short as this is not worth a launch more.
_SHORT = 256
_SUMS, _READS = 1, 2  # passes of a launch


class _Rows(ctypes.Structure):
    """A tensor (batch, position, channel) with strides in bytes, as in the kernels."""

    _fields_ = fields((c_void_p, 'data'), (c_int64, 'batch position'))

    @classmethod
    def of(cls, x: Tensor) -> '_Rows':
        """The rows of a tensor (B, L, C), or (L, C) for every batch element."""
        batch, position, _ = x.stride() if x.ndim == 3 else (0, *x.stride())
        return cls(x.data_ptr(), batch * x.element_size(), position * x.element_size())


class _Args(ctypes.Structure):
    _fields_ = fields(
        (_Rows, 'q k v y grad_q grad_k grad_v cosine sine'),
        (c_void_p, 'sums grad_sums'),
        (c_int32, 'batch heads length split_length key_channels value_channels'),
        (c_float, 'eps scale'),
    )


class _Call(NamedTuple):
    """Inputs as the kernels read them.

    Attributes:
        q, k, v: (B, L, C) and (B, L, C'), of neighbouring channels.
        tables: Cosine and sine (L, C / 2), or nothing.
        options: Of the op.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    tables: tuple[Tensor, ...]
    options: AttentionOptions

    @classmethod
    def of(cls, inputs: AttentionInputs, options: AttentionOptions) -> '_Call':
        q, k, v = (_neighbours(x) for x in inputs[:3])
        tables = tuple(x.contiguous() for x in inputs[3:] if x is not None)
        return cls(q, k, v, tables, options)

    @property
    def channels(self) -> tuple[int, int]:
        """Of a head's keys and of its values."""
        heads = self.options.heads
        return self.q.shape[2] // heads, self.v.shape[2] // heads

    @property
    def blocks(self) -> tuple[int, int]:
        """Of the channels of keys and of values."""
        keys, values = (-(-count // _BLOCK) for count in self.channels)
        return keys, values

    @property
    def is_single(self) -> bool:
        """Whether a head is a block of either kind."""
        return self.blocks == (1, 1)

    @property
    def stages(self) -> int:
        """Of copies: two hide the latency of memory, one has room for more blocks."""
        return 2 if self.is_single else 1

    @property
    def resident(self) -> int:
        """CTAs of a multiprocessor that share out its registers and its memory."""
        if not self.is_single:
            return 2
        dtypes = self.q.dtype, self.k.dtype, self.v.dtype, self.options.out_dtype
        return 3 if torch.float32 in dtypes else 4

    def tasks(self, kernel: Kernel, passes: int) -> int:
        """CTAs of a launch for each split of the positions."""
        keys, values = self.blocks
        of_head = values if kernel is FORWARD else max(keys, values)
        if passes == _SUMS:
            of_head = keys * values
        return self.q.shape[0] * self.options.heads * of_head

    def splits(self, kernel: Kernel, passes: int) -> int:
        """Into how many the positions are split, as long as the GPU is not full."""
        room = kernels.multiprocessors(self.q) * self.resident
        turns = -(-self.q.shape[1] // _POSITIONS)
        wanted = max(1, room // self.tasks(kernel, passes))
        return -(-turns // -(-turns // wanted))

    def at_once(self, kernel: Kernel) -> bool:
        """Whether one launch makes the sums and reads them."""
        short = self.q.shape[1] <= _SHORT
        return self.is_single and (short or self.splits(kernel, _SUMS) == 1)

    def sum(self, kernel: Kernel, name: str, y: Tensor, **others: Tensor) -> Tensor:
        """Launch what makes the sums of that name, and add up those of the splits."""
        splits = self.splits(kernel, _SUMS)
        parts = _sums_like(self.q, self.v, self.options, splits)
        self.launch(kernel, _SUMS, y, splits, **{name: parts}, **others)
        return parts[0] if splits == 1 else parts.sum(0)

    def launch(
        self,
        kernel: Kernel,
        passes: int,
        y: Tensor,
        splits: int | None = None,
        sums: Tensor | None = None,
        grad_sums: Tensor | None = None,
        **grads: Tensor,
    ) -> None:
        """Put a kernel onto the stream.

        Args:
            kernel: Which one.
            passes: What it does.
            y: The output, or its gradient.
            splits: How many, by default as many as fill the GPU.
            sums, grad_sums: Of the splits where they are written, else of all.
            grads: Those to be written, by their names in the kernel args.
        """
        batch, length, _ = self.q.shape
        keys, values = self.channels
        splits = splits or self.splits(kernel, passes)
        split_length = -(-length // (splits * _POSITIONS)) * _POSITIONS
        arrays = dict(q=self.q, k=self.k, v=self.v, y=y, **grads)
        arrays |= zip(('cosine', 'sine'), self.tables)
        args = _Args(
            **{name: _Rows.of(x) for name, x in arrays.items()},
            **dict(sums=pointer(sums), grad_sums=pointer(grad_sums)),
            **dict(batch=batch, heads=self.options.heads, length=length),
            **dict(split_length=split_length, key_channels=keys, value_channels=values),
            **dict(eps=self.options.eps, scale=1 / length),
        )
        kernel.launch(
            self._constants(passes, arrays),
            args,
            grid=self.tasks(kernel, passes) * -(-length // split_length),
            threads=_THREADS,
            shared=self._shared(kernel, passes, y.element_size()),
            on=self.q,
        )

    def _constants(self, passes: int, arrays: dict[str, Tensor]) -> dict[str, int]:
        key_blocks, value_blocks = self.blocks
        places: list[int] = []
        for x in arrays.values():
            places += [x.data_ptr(), *(n * x.element_size() for n in x.stride()[:-1])]
        return dict(
            **{f'{x.upper()}_DTYPE': Array.dtypes[arrays[x].dtype] for x in 'qkvy'},
            **dict(KEY_BLOCKS=key_blocks, VALUE_BLOCKS=value_blocks),
            **dict(ROTARY=len(self.tables) // 2, NORMALISE=int(self.options.normalise)),
            VECTOR=int(_are_multiples(self.channels, 8) and _are_multiples(places, 16)),
            **dict(PASSES=passes, STAGES=self.stages, RESIDENT=self.resident),
            **dict(CHANNELS=_BLOCK, POSITIONS=_POSITIONS, THREADS=_THREADS),
        )

    def _shared(self, kernel: Kernel, passes: int, size: int) -> int:
        """Bytes of shared memory, of which the kernels know; ``size`` is that of y."""
        keys, values = self.blocks
        rows = _ROWS * _BLOCK
        q, k, v = (rows * x.element_size() for x in (self.q, self.k, self.v))
        tables = 2 * rows * len(self.tables)
        sums, factor = 4 * (_BLOCK + 1) * _BLOCK, 8 * _BLOCK**2
        if kernel is FORWARD:
            factors = 0, keys
            stages = k + v + tables, keys * (q + tables)
        else:
            factors = keys * values, keys + values
            stages = (
                keys * (q + tables) + values * rows * size,
                keys * (k + tables) + values * v,
            )
        rings = [_WARPS * self.stages * stage for stage in stages]
        first = factors[0] * factor + max(rings[0], _WARPS * sums)
        second = factors[1] * factor + rings[1]
        if passes == _SUMS:
            return first
        return second if passes == _READS else sums + max(first, second)


class CudaAttention(KernelBackend):
    """A launch over keys and one over queries, or one over both; so the gradients."""

    supplier = backends.CUDA

    def refuses(self, inputs: AttentionInputs, options: AttentionOptions) -> str | None:
        """It computes in float32, for heads that are not too wide."""
        if options.dtype != torch.float32:
            return f'it computes in float32, not {options.dtype}'
        widest = max(inputs.q.shape[2], inputs.v.shape[2]) // options.heads
        if widest > _MOST_CHANNELS:
            return f'it takes up to {_MOST_CHANNELS} channels of a head, not {widest}'
        return None

    def forward(
        self, inputs: AttentionInputs, options: AttentionOptions, keep: bool
    ) -> Result:
        """See :func:`mmvssm.ops.linear_attention`."""
        call = _Call.of(inputs, options)
        q, v = inputs.q, inputs.v
        y = v.new_empty(v.shape, dtype=options.out_dtype)
        if call.at_once(FORWARD):
            sums = _sums_like(q, v, options) if keep else None
            call.launch(FORWARD, _SUMS | _READS, y, splits=1, sums=sums)
        else:
            sums = call.sum(FORWARD, 'sums', y)
            call.launch(FORWARD, _READS, y, sums=sums)
        saved = (sums,) if keep and sums is not None else ()
        return Result((y,), saved, has_nan=False)

    def saved_like(
        self, inputs: AttentionInputs, options: AttentionOptions
    ) -> tuple[Tensor, ...]:
        """Mean products of turned keys with values, and mean keys, of each head."""
        return (_sums_like(inputs.q, inputs.v, options),)

    def backward(
        self,
        inputs: AttentionInputs,
        options: AttentionOptions,
        saved: Outputs,
        grads: tuple[Tensor | None, ...],
        wanted: AttentionInputs,
    ) -> AttentionInputs:
        """All gradients."""
        call = _Call.of(inputs, options)
        grad = readable(grads[0], Array)
        assert grad is not None, 'there is one output'
        grad, (sums,) = _neighbours(grad), saved
        q, k, v = (x.new_empty(x.shape) for x in inputs[:3])
        if call.at_once(BACKWARD):
            both = _SUMS | _READS
            call.launch(
                BACKWARD, both, grad, splits=1, sums=sums, grad_q=q, grad_k=k, grad_v=v
            )
        else:
            by_sums = call.sum(BACKWARD, 'grad_sums', grad, sums=sums, grad_q=q)
            call.launch(BACKWARD, _READS, grad, grad_sums=by_sums, grad_k=k, grad_v=v)
        return AttentionInputs(q, k, v)


def _sums_like(q: Tensor, v: Tensor, options: AttentionOptions, *splits: int) -> Tensor:
    """Memory for the sums of all heads, of each split."""
    heads = options.heads
    keys, values = q.shape[2] // heads, v.shape[2] // heads
    shape = *splits, q.shape[0], heads, keys * (values + 1)
    return q.new_empty(shape, dtype=torch.float32)


def _neighbours(x: Tensor) -> Tensor:
    """The tensor (B, L, C) with neighbouring channels, as the kernels read it."""
    # They multiply positions by strides in bytes of 32 bits.
    near = x.stride(1) * x.element_size() < 2**31
    return x if x.stride(2) == 1 and near else x.contiguous()


def _are_multiples(numbers: Iterable[int], of: int) -> bool:
    return not any(n % of for n in numbers)
