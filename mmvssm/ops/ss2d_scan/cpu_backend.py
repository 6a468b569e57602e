"""ss2d_scan by compiled CPU kernels: all scans and their sum in one pass."""

import ctypes
from ctypes import byref, c_int32
from functools import lru_cache

import torch
from torch import Tensor

from mmvssm.ops import backends
from mmvssm.ops.contract import Result
from mmvssm.ops.cpu import library
from mmvssm.ops.cpu.library import Ss2dArgs
from mmvssm.ops.kernel_args import pointer
from mmvssm.ops.scan_orders import KernelOrders
from mmvssm.ops.selective_scan.cpu_backend import clear_unused, saved_states_shape
from mmvssm.ops.ss2d_scan.declaration import (
    FusedSs2d,
    KernelInputs,
    Ss2dInputs,
    Ss2dOptions,
    gradients_of,
    walked_orders,
)
from mmvssm.ops.typed import sole


class CpuSs2d(FusedSs2d):
    """Channel blocks in parallel; the scans of each one after the other."""

    supplier = backends.CPU
    dtypes = (torch.float32,)

    def states_shape(
        self, batch: int, positions: int, states: int, channels: int
    ) -> tuple[int, ...]:
        """Shape of memory for the states before all chunks but the first."""
        return saved_states_shape(batch, positions, states, channels)

    def forward(self, inputs: Ss2dInputs, options: Ss2dOptions, keep: bool) -> Result:
        """See :func:`mmvssm.ops.ss2d_scan`."""
        orders = walked_orders(inputs, options)
        read = KernelInputs.of(inputs, options, self.dtypes)
        states = self.states_like(inputs, orders) if keep else None
        if states is not None:
            batch, channels, height, width = inputs.x.shape
            size = batch, orders.positions(height * width), inputs.A.shape[1], channels
            # The kernel writes the states of all scans one after the other.
            clear_unused(states.view(-1), len(orders.routes), size)
        out = torch.empty_like(read.x)
        args = _args(read, orders, out=out, saved=states)
        has_nan = library.kernel('ss2d_forward')(byref(args), library.parallel_for())
        saved = () if states is None else (read.kept(options), states)
        return Result((out.permute(0, 3, 1, 2).to(options.out_dtype),), saved, has_nan)

    def backward(
        self,
        inputs: Ss2dInputs,
        options: Ss2dOptions,
        saved: tuple[Tensor, ...],
        grads: tuple[Tensor | None, ...],
        wanted: Ss2dInputs,
    ) -> Ss2dInputs:
        """All gradients, in one pass from the last chunk to the first."""
        orders = walked_orders(inputs, options)
        read = KernelInputs.of(inputs, options, self.dtypes, projected=saved[0])
        grad_out = sole(grads).permute(0, 2, 3, 1).float().contiguous()
        x = read.x
        batch, height, width, channels = x.shape
        count, _, rank = read.dt_weight.shape
        states = read.A.shape[1]
        columns = count * (rank + 2 * states)
        grad_x = torch.empty_like(x)
        by_projected = x.new_empty(
            library.channel_blocks(channels), batch, height, width, columns
        )
        by_weight = x.new_empty(batch, count, rank, channels)
        by_bias, by_D = (x.new_empty(batch, count, channels) for _ in range(2))
        by_A = x.new_empty(batch, count, states, channels)
        args = _args(
            read,
            orders,
            saved=saved[1],
            grad_out=grad_out,
            grad_x=grad_x,
            grad_projected=by_projected,
            grad_dt_weight=by_weight,
            grad_dt_bias=by_bias,
            grad_A=by_A,
            grad_D=by_D,
        )
        library.kernel('ss2d_backward')(byref(args), library.parallel_for())
        return gradients_of(
            *(inputs, options, grad_x, by_projected.sum(0)),
            *(by_weight.sum(0).mT, by_bias.sum(0)),
            *(by_A.sum(0).mT.reshape(read.A.shape), by_D.sum(0).flatten()),
        )


def _args(
    inputs: KernelInputs, orders: KernelOrders, **results: Tensor | None
) -> Ss2dArgs:
    """The kernel args of a call; its tensors must stay alive until it returns."""
    batch, height, width, channels = inputs.x.shape
    return Ss2dArgs(
        batch=batch,
        channels=channels,
        height=height,
        width=width,
        states=inputs.A.shape[1],
        rank=inputs.dt_weight.shape[2],
        orders=len(orders.routes),
        positions=orders.positions(height * width),
        routes=_numbers(orders.routes),
        table=pointer(orders.table),
        x=pointer(inputs.x),
        projected=pointer(inputs.projected),
        projected_stride=inputs.projected.stride(2),
        dt_weight=pointer(inputs.dt_weight),
        dt_bias=pointer(inputs.dt_bias),
        A=pointer(inputs.A),
        D=pointer(inputs.Ds),
        **{name: pointer(x) for name, x in results.items()},
    )


@lru_cache
def _numbers(routes: tuple[int, ...]) -> 'ctypes.Array[c_int32]':
    """The numbers as a C array."""
    return (c_int32 * len(routes))(*routes)
