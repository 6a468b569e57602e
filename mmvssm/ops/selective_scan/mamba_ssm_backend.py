"""The selective scan by the CUDA kernels of the package mamba_ssm.

They take 16-bit tensors and return such; here inputs are cast beforehand
where the output is to be float32. Their weight gradients are made by atomic
additions, whose order differs from run to run, so this is the one backend that
does not promise the same bits; torch's deterministic mode rules it out. They know
no gradient of the last state.
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

    # What is a constant of its base is asked for at each call here.
    @property
    def differentiable(self) -> bool:  # type: ignore[override]
        """By its own autograd function, which keeps what its backward pass needs.

        torch.compile and the like cannot see into that.
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
            # An op of torch.library may return no view of something else.
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
        """All gradients, by another forward pass; under torch.compile and the like.

        Raises:
            RuntimeError: There is a gradient of the last state.
        """
        grad_out, grad_last_state = grads
        if grad_last_state is not None:
            raise RuntimeError(_NO_GRADIENT)
        assert grad_out is not None, 'of two gradients one is there'
        # Inside an op of torch.library torch records nothing; what mamba_ssm's own
        # autograd function takes and returns must therefore be left as it is.
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
    """All activations in one dtype, the widest of theirs; the weights in float32."""
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
    "the scan backend 'mamba_ssm' knows no gradient of the last state; take another "
    "one (backend='torch'), or keep the last state out of the loss (detach it)"
)


class _LastState(torch.autograd.Function):
    """Passes the last state on, and refuses the gradient its kernel would drop."""

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
    """Where torch only warns of what is not reproducible, warn as well."""
    if torch.is_deterministic_algorithms_warn_only_enabled():
        warnings.warn(
            "the scan backend 'mamba_ssm' gives gradients whose bits differ from run "
            'to run',
            stacklevel=2,
        )
