"""The selective scan by own CUDA kernels, forward and backward.

With one state a channel and with several the work is shared out among threads in
different ways, see ``one_state`` and ``many_states`` in ``mmvssm/ops/cuda/``.
"""

import torch
from torch import Tensor

from mmvssm.ops import backends
from mmvssm.ops.contract import KernelBackend, Result
from mmvssm.ops.cuda import many_states, one_state
from mmvssm.ops.cuda.scan import Scan, ScanKernels
from mmvssm.ops.selective_scan.declaration import ScanInputs, ScanOptions, outputs_like


def kernels_for(states: int) -> ScanKernels:
    """Those for a number of states."""
    return one_state if states == 1 else many_states


class CudaScan(KernelBackend):
    """Chunks of positions, one after the other or side by side."""

    supplier = backends.CUDA

    def forward(self, inputs: ScanInputs, options: ScanOptions, keep: bool) -> Result:
        """See :func:`mmvssm.ops.selective_scan`; B and C are (B, G, N, L)."""
        out, last_state = outputs_like(inputs, options)
        saved = self.saved_like(inputs, options) if keep else ()
        kernels_for(inputs.A.shape[1]).forward(
            *(_scan(inputs, options), out),
            last_state=last_state if options.return_last_state else None,
            saved=saved[0] if keep else None,
        )
        return Result((out, last_state), saved)

    def saved_like(
        self, inputs: ScanInputs, options: ScanOptions
    ) -> tuple[Tensor, ...]:
        """The states before the chunks but the first."""
        batch, channels, length = inputs.u.shape
        states = inputs.A.shape[1]
        shape = kernels_for(states).saved_shape(batch, length, states, channels)
        return (inputs.u.new_empty(shape, dtype=torch.float32),)

    def backward(
        self,
        inputs: ScanInputs,
        options: ScanOptions,
        saved: tuple[Tensor, ...],
        grads: tuple[Tensor | None, ...],
        wanted: ScanInputs,
    ) -> ScanInputs:
        """All gradients, from the last chunk to the first."""
        grad_out, grad_last_state = grads
        if grad_out is None:
            grad_out = inputs.u.new_zeros(()).expand_as(inputs.u)
        scan = _scan(inputs, options)
        by_u, by_delta = torch.empty_like(scan.u), torch.empty_like(inputs.delta)
        by_z = None if scan.z is None else torch.empty_like(scan.z)
        by_A, by_B, by_C, by_D, by_bias = kernels_for(inputs.A.shape[1]).backward(
            scan, saved[0], grad_out, grad_last_state, (by_u, by_delta, by_z)
        )
        return ScanInputs(
            u=by_u,
            delta=by_delta,
            A=by_A,
            B=by_B.mT,
            C=by_C.mT,
            D=by_D,
            z=by_z,
            delta_bias=by_bias,
        )


def _scan(inputs: ScanInputs, options: ScanOptions) -> Scan:
    return Scan(
        u=inputs.u,
        A=inputs.A,
        B=inputs.B,
        C=inputs.C,
        delta=inputs.delta,
        D=inputs.D,
        z=inputs.z,
        bias=inputs.delta_bias,
        softplus=options.delta_softplus,
    )
