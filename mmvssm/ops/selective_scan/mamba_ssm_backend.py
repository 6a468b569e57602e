"""The selective scan by the CUDA kernels of the package mamba_ssm.

For 16-bit inputs these kernels return 16-bit outputs. So inputs are converted first if
the output must be float32. The kernels compute gradients of weights by atomic
additions, whose order differs from run to run. So this is the only backend that does
not promise the same bits, and it is not used in torch's deterministic mode. The kernels
have no gradient of the last state.
"""

import contextlib
import warnings
from typing import Any

import torch
from torch import Tensor

from mmvssm.ops import backends, bypass
from mmvssm.ops.contract import KernelBackend, Result
from mmvssm.ops.mamba_ssm import scan_function
from mmvssm.ops.selective_scan.declaration import ScanInputs, ScanOptions
from mmvssm.ops.typed import apply


class MambaSsmScan(KernelBackend):
    """``selective_scan_fn`` of that package."""

    supplier = backends.MAMBA_SSM

    # A constant in the base class, but computed at each call here.
    @property
    def differentiable(self) -> bool:  # type: ignore[override]
        """Use the package's own autograd function, which saves what it needs.

        torch.compile and similar tools cannot look into that function.
        """
        return bypass.unobserved()

    def forward(self, inputs: ScanInputs, options: ScanOptions, keep: bool) -> Result:
        """See :func:`mmvssm.ops.selective_scan`; B and C are (B, G, N, L)."""
        _warn_if_deterministic()
        with torch.no_grad() if keep else contextlib.nullcontext():
            out, last_state = _call(_as_kernels_read(inputs, options), options)
            out = out.to(options.out_dtype)
            if out.stride() != inputs.u.stride():
                out = torch.empty_like(inputs.u, dtype=out.dtype).copy_(out)
            last_state = apply(_LastState, last_state)
        if keep:
            # An op of torch.library must not return a view of another tensor.
            last_state = last_state.clone(memory_format=torch.contiguous_format)
        return Result((out, last_state))

    def backward(
        self,
        inputs: ScanInputs,
        options: ScanOptions,
        saved: tuple[Tensor, ...],
        grads: tuple[Tensor | None, ...],
        wanted: ScanInputs,
    ) -> ScanInputs:
        """All gradients, by a second forward pass; for torch.compile and similar tools.

        Raises:
            RuntimeError: The last state has a gradient.
        """
        grad_out, grad_last_state = grads
        if grad_last_state is not None:
            raise RuntimeError(_NO_GRADIENT)
        assert grad_out is not None, 'one of the two gradients exists'
        # Inside an op of torch.library torch records no graph. So what mamba_ssm's own
        # autograd function takes and returns must not be changed.
        leaves = [
            None if x is None else x.detach().requires_grad_()
            for x in _as_kernels_read(inputs, options)
        ]
        with torch.enable_grad():
            out, _ = _call(ScanInputs._make(leaves), options)
        there = [x for x in leaves if x is not None]
        found = iter(torch.autograd.grad(out, there, grad_out.to(out.dtype)))
        return ScanInputs._make(None if x is None else next(found) for x in leaves)


def _as_kernels_read(inputs: ScanInputs, options: ScanOptions) -> ScanInputs:
    """Convert activations to the widest of their dtypes, and weights to float32."""
    u, delta, A, B, C, D, z, delta_bias = inputs
    dtype = options.out_dtype
    for x in (u, delta, B, C, z):
        if x is not None:
            dtype = torch.promote_types(dtype, x.dtype)
    if dtype == torch.float64:
        dtype = torch.float32
    u, delta, B, C = (x.to(dtype) for x in (u, delta, B, C))
    D, delta_bias = (None if x is None else x.float() for x in (D, delta_bias))
    z = None if z is None else z.to(dtype)
    return ScanInputs(u, delta, A.float(), B, C, D, z, delta_bias)


def _call(inputs: ScanInputs, options: ScanOptions) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = scan_function()(
        *inputs, delta_softplus=options.delta_softplus, return_last_state=True
    )
    return found


_NO_GRADIENT = (
    "the scan backend 'mamba_ssm' has no gradient of the last state; use another "
    "one (backend='torch'), or keep the last state out of the loss (detach it)"
)


class _LastState(torch.autograd.Function):
    """Passes the last state on, and refuses a gradient that the kernel would drop."""

    @staticmethod
    def forward(ctx: Any, last_state: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return last_state.view_as(last_state)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        if grad is not None:
            raise RuntimeError(_NO_GRADIENT)
        return None


def _warn_if_deterministic() -> None:
    """Warn if torch is set to warn about results that are not reproducible."""
    if torch.is_deterministic_algorithms_warn_only_enabled():
        warnings.warn(
            "the scan backend 'mamba_ssm' gives gradients whose bits differ from run "
            'to run',
            stacklevel=2,
        )
