"""The selective scan by the CUDA kernels of the package mamba_ssm.

They take 16-bit tensors and return such; here inputs are cast beforehand
where the output is to be float32. Their weight gradients are made by atomic
additions, whose order differs from run to run, so this is the one backend that
does not promise the same bits; it is never chosen unasked, nor in torch's
deterministic mode. They know no gradient of the last state.
"""

import warnings

import torch
from torch import Tensor

from mmvssm.ops import checks
from mmvssm.ops.mamba_ssm import scan_function


def saved_states_shape(
    batch: int, length: int, states: int, channels: int
) -> tuple[int]:
    """Shape of what :func:`forward` keeps: nothing."""
    return (0,)


def scan_with_gradients(
    inputs: tuple[Tensor | None, ...], delta_softplus: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The scan, differentiated by mamba_ssm's own autograd function.

    Args:
        inputs: u, delta, A, B, C, D, z, delta_bias of
            :func:`mmvssm.ops.selective_scan`; B and C are (B, G, N, L).

    Returns:
        The output (B, D, L) with u's strides, and the last state (B, D, N).
    """
    _warn_if_deterministic()
    u = inputs[0]
    out, last_state = _call(_as_kernels_read(inputs, out_dtype), delta_softplus)
    out = out.to(out_dtype)
    if out.stride() != u.stride():
        out = torch.empty_like(u, dtype=out_dtype).copy_(out)
    return out, _LastState.apply(last_state)


def _as_kernels_read(
    inputs: tuple[Tensor | None, ...], out_dtype: torch.dtype
) -> list[Tensor | None]:
    """All activations in one dtype, the widest of theirs; the weights in float32."""
    u, delta, A, B, C, D, z, delta_bias = inputs
    dtype = out_dtype
    for x in (u, delta, B, C, z):
        if x is not None:
            dtype = torch.promote_types(dtype, x.dtype)
    if dtype == torch.float64:
        dtype = torch.float32
    u, delta, B, C, z = (x if x is None else x.to(dtype) for x in (u, delta, B, C, z))
    A, D, delta_bias = (x if x is None else x.float() for x in (A, D, delta_bias))
    return [u, delta, A, B, C, D, z, delta_bias]


def _call(inputs: list[Tensor | None], delta_softplus: bool) -> tuple[Tensor, Tensor]:
    return scan_function()(
        *inputs, delta_softplus=delta_softplus, return_last_state=True
    )


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    out_dtype: torch.dtype,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """See :func:`mmvssm.ops.selective_scan`; B and C are (B, G, N, L).

    Returns:
        The output (B, D, L) with u's strides, the last state (B, D, N), with
        ``keep_states`` an empty tensor, and whether there is NaN.
    """
    with torch.no_grad():
        out, last_state = scan_with_gradients(
            (u, delta, A, B, C, D, z, delta_bias), delta_softplus, out_dtype
        )
    saved = out.new_empty(0, dtype=torch.float32) if keep_states else None
    # As an op of torch.library it may return no view of something else.
    last_state = last_state.clone(memory_format=torch.contiguous_format)
    return out, last_state, saved, checks.has_nan(out, last_state)


def backward(
    grad_out: Tensor | None,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    saved: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z and delta_bias.

    Used under torch.compile and the like alone: what mamba_ssm keeps for its
    backward pass is not to be had from outside, so its forward pass runs again.

    Raises:
        RuntimeError: There is a gradient of the last state.
    """
    if grad_last_state is not None:
        raise RuntimeError(_NO_GRADIENT)
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    # Inside an op of torch.library torch records nothing; what mamba_ssm's own
    # autograd function takes and returns must therefore be left as it is.
    leaves = [
        None if x is None else x.detach().requires_grad_()
        for x in _as_kernels_read(inputs, grad_out.dtype)
    ]
    with torch.enable_grad():
        out, _ = _call(leaves, delta_softplus)
    wanted = [x for x in leaves if x is not None]
    found = iter(torch.autograd.grad(out, wanted, grad_out.to(out.dtype)))
    return tuple(
        None if x is None else torch.empty_like(x).copy_(next(found)) for x in inputs
    )


_NO_GRADIENT = (
    "the scan backend 'mamba_ssm' knows no gradient of the last state; take another "
    "one (backend='torch'), or keep the last state out of the loss (detach it)"
)


class _LastState(torch.autograd.Function):
    """Passes the last state on, and refuses the gradient its kernel would drop."""

    @staticmethod
    def forward(ctx, last_state: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return last_state.view_as(last_state)

    @staticmethod
    def backward(ctx, grad: Tensor | None) -> Tensor | None:
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
