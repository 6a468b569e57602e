"""The selective scan by compiled CPU kernels, forward and backward.

Only the state before each chunk of positions is kept for the backward pass, which
recomputes the rest. The kernels are in ``mmvssm/ops/cpu/``.
"""

from ctypes import byref

import torch
from torch import Tensor

from mmvssm.ops import backends
from mmvssm.ops.contract import KernelBackend, Result
from mmvssm.ops.cpu import library
from mmvssm.ops.cpu.library import Array, ScanArgs
from mmvssm.ops.kernel_args import parameter, pointer, readable
from mmvssm.ops.selective_scan.declaration import ScanInputs, ScanOptions, outputs_like


class CpuScan(KernelBackend):
    """Channel blocks in parallel, chunks of positions one after the other."""

    supplier = backends.CPU

    def forward(self, inputs: ScanInputs, options: ScanOptions, keep: bool) -> Result:
        """See :func:`mmvssm.ops.selective_scan`; B and C are (B, G, N, L)."""
        out, last_state = outputs_like(inputs, options)
        saved = self.saved_like(inputs, options) if keep else ()
        if keep:
            batch, channels, length = inputs.u.shape
            clear_unused(saved[0], 1, (batch, length, inputs.A.shape[1], channels))
        read = _read(inputs)
        args = ScanArgs(
            **_input_args(read, options),
            out=Array.of(out),
            last_state=pointer(last_state),
            saved=pointer(saved[0]) if keep else None,
        )
        has_nan = library.kernel('scan_forward')(byref(args), library.parallel_for())
        return Result((out, last_state), saved, has_nan)

    def saved_like(
        self, inputs: ScanInputs, options: ScanOptions
    ) -> tuple[Tensor, ...]:
        """Memory for the states before all chunks but the first."""
        batch, channels, length = inputs.u.shape
        shape = saved_states_shape(batch, length, inputs.A.shape[1], channels)
        return (inputs.u.new_empty(shape, dtype=torch.float32),)

    def backward(
        self,
        inputs: ScanInputs,
        options: ScanOptions,
        saved: tuple[Tensor, ...],
        grads: tuple[Tensor | None, ...],
        wanted: ScanInputs,
    ) -> ScanInputs:
        """All gradients, in one pass from the last chunk to the first."""
        grad_out, grad_last_state = readable(grads[0], Array), parameter(grads[1])
        if grad_out is None:
            grad_out = torch.zeros_like(inputs.u)
        read = _read(inputs)
        u, delta, _, B, _, _, z, _ = read
        (batch, channels, length), groups, states = u.shape, *B.shape[1:3]

        def sums(*shape: int) -> Tensor:
            return u.new_empty(shape, dtype=torch.float32)

        by_u, by_delta = torch.empty_like(u), torch.empty_like(delta)
        by_z = None if z is None else torch.empty_like(z)
        blocks = library.channel_blocks(channels // groups)
        by_B, by_C = (sums(blocks, batch, groups, length, states) for _ in 'BC')
        by_A = sums(batch, states, channels)
        by_D, by_bias = sums(batch, channels), sums(batch, channels)
        args = ScanArgs(
            **_input_args(read, options),
            saved=pointer(saved[0]),
            grad_out=Array.of(grad_out),
            grad_last_state=pointer(grad_last_state),
            grad_u=Array.of(by_u),
            grad_delta=Array.of(by_delta),
            grad_z=Array.of(by_z),
            grad_B=pointer(by_B),
            grad_C=pointer(by_C),
            grad_A=pointer(by_A),
            grad_D=pointer(by_D),
            grad_bias=pointer(by_bias),
        )
        library.kernel('scan_backward')(byref(args), library.parallel_for())
        return ScanInputs(
            u=by_u,
            delta=by_delta,
            A=by_A.sum(0).T,
            B=by_B.sum(0).mT,
            C=by_C.sum(0).mT,
            D=by_D.sum(0),
            z=by_z,
            delta_bias=by_bias.sum(0),
        )


def saved_states_shape(
    batch: int, length: int, states: int, channels: int
) -> tuple[int]:
    """Shape of memory for the states before all chunks but the first.

    There are (chunks - 1) of them, (B, N, D) each. It is one axis that is never 0 or 1:
    torch asks of tensors whether they have such an axis, and a graph would serve either
    maps of one chunk or larger ones, not both.
    """
    return (length // library.chunk_length() * batch * states * channels + 2,)


def clear_unused(saved: Tensor, scans: int, size: tuple[int, int, int, int]) -> None:
    """Zero the memory of saved states that the kernels do not write.

    Args:
        saved: (..., M), on its last axis the states of so many scans.
        scans: How many.
        size: Batch, length, states and channels.
    """
    batch, length, states, channels = size
    chunks = -(-length // library.chunk_length())
    saved[..., scans * (chunks - 1) * batch * states * channels :].zero_()


def _read(inputs: ScanInputs) -> ScanInputs:
    """The inputs as the kernels read them."""
    u, delta, A, B, C, D, z, delta_bias = inputs
    return ScanInputs(
        *(readable(u, Array), readable(delta, Array), parameter(A)),
        *(readable(B, Array), readable(C, Array), parameter(D)),
        *(readable(z, Array), parameter(delta_bias)),
    )


def _input_args(inputs: ScanInputs, options: ScanOptions) -> dict[str, object]:
    """The kernel args that both passes have."""
    batch, channels, length = inputs.u.shape
    return dict(
        batch=batch,
        channels=channels,
        length=length,
        states=inputs.A.shape[1],
        groups=inputs.B.shape[1],
        softplus=options.delta_softplus,
        u=Array.of(inputs.u),
        delta=Array.of(inputs.delta),
        z=Array.of(inputs.z),
        B=Array.of(inputs.B),
        C=Array.of(inputs.C),
        A=pointer(inputs.A),
        D=pointer(inputs.D),
        bias=pointer(inputs.delta_bias),
    )
