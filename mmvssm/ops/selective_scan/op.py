"""The public selective scan: checks, choice of a backend, registration."""

import torch
from torch import Tensor

from mmvssm.ops import autocast, checks, direct
from mmvssm.ops.backends import choose_backend
from mmvssm.ops.selective_scan import (
    cpu_backend,
    cuda_backend,
    mamba_ssm_backend,
    torch_backend,
    triton_backend,
)
from mmvssm.ops.selective_scan.reference import selective_scan_reference

# Every backend but the reference, whose gradients are autograd's, supplies
# forward, backward and saved_states_shape.
_IMPLEMENTATIONS = {
    'cpu': cpu_backend,
    'triton': triton_backend,
    'cuda': cuda_backend,
    'mamba_ssm': mamba_ssm_backend,
    'torch': torch_backend,
}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    return_last_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Selective scan of Mamba (`arXiv 2312.00752`_, section 3.2).

    With Δ = softplus(delta + delta_bias) (the softplus optional), for every
    batch element, channel and position

    .. math::
        h_t = \exp(\Delta_t A) h_{t-1} + \Delta_t B_t u_t, \quad
        y_t = (C_t \cdot h_t + D u_t) \, \mathrm{SiLU}(z_t)

    where h is a vector of N states that starts at zero. State and accumulation
    are float32 (float64 for float64 inputs) whatever the inputs are. Memory
    strides are free; the output has those of ``u``. Channels-last tensors,
    (B, L, D) in memory, are the fast ones on the CPU.

    Args:
        u: Input (B, D, L), float32, bfloat16, float16 or float64.
        delta: Step sizes before bias and softplus, (B, D, L).
        A: Decay rates (D, N), real, usually negative.
        B: Input weights (B, N, L), or grouped (B, G, N, L) with G dividing D:
            channel d uses group d // (D / G).
        C: Output weights, of B's shape.
        D: Skip weights (D,).
        z: Gate (B, D, L).
        delta_bias: Bias of the step sizes (D,).
        delta_softplus: Apply softplus to the step sizes.
        return_last_state: Also return the state after the last position.
        backend: One of :func:`mmvssm.ops.list_backends`; by default the choice
            follows the device and dtype of ``u``.

    Returns:
        The output (B, D, L) in u's dtype, under autocast in float32. With
        ``return_last_state`` a pair with the last state (B, D, N), float32.

    Raises:
        TypeError: Something is not a tensor of a supported dtype.
        ValueError: Shapes or devices do not fit, a dimension is empty, the
            backend is unknown, or (on the CPU) an input has NaN.
        BackendUnavailableError: The backend asked for cannot run.
        RuntimeError: (``mamba_ssm``, at the backward pass) The loss depends on
            the last state.

    .. _arXiv 2312.00752: https://arxiv.org/abs/2312.00752
    """
    out, last_state = scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend=backend
    )
    return (out, last_state) if return_last_state else out


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    *,
    float32_out: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`selective_scan`, if need be with float32 output, and the last state."""
    _check(u, delta, A, B, C, D, z, delta_bias)
    out_dtype = u.dtype
    if float32_out or autocast.is_enabled(u):
        out_dtype = torch.promote_types(u.dtype, torch.float32)
    name = choose_backend(u.device.type, u.dtype, backend, states=A.shape[1])
    if B.ndim == 3:
        B, C = B.unsqueeze(1), C.unsqueeze(1)
    if name == 'reference':
        with autocast.disabled(u):
            out, last_state = selective_scan_reference(
                u, delta, A, B, C, D, z, delta_bias, delta_softplus, out_dtype
            )
        if not torch.compiler.is_compiling() and checks.has_nan(out, last_state):
            inputs = (u, delta, A, B, C, D, z, delta_bias)
            checks.refuse_nan('selective_scan', dict(zip(_NAMES, inputs)))
        return out, last_state
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    if name == 'mamba_ssm' and direct.unobserved(*inputs):
        # Its own autograd function keeps what its backward pass needs.
        with autocast.disabled(u):
            return mamba_ssm_backend.scan_with_gradients(
                inputs, delta_softplus, out_dtype
            )
    if direct.possible(*inputs):
        out, last_state, _ = _forward(
            inputs, delta_softplus, out_dtype, name, keep_states=False
        )
    else:
        out, last_state, _ = _forward_op(*inputs, delta_softplus, out_dtype, name)
    return out, last_state


def _forward(
    inputs: tuple[Tensor | None, ...],
    delta_softplus: bool,
    out_dtype: torch.dtype,
    backend: str,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The output, the last state and, if asked for, what backward needs."""
    with autocast.disabled(inputs[0]):
        out, last_state, saved, has_nan = _IMPLEMENTATIONS[backend].forward(
            *inputs, delta_softplus, out_dtype, keep_states
        )
    if has_nan:
        checks.refuse_nan('selective_scan', dict(zip(_NAMES, inputs)))
    return out, last_state, saved


# The checks


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NAMES = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')


def _check(*inputs: Tensor | None) -> None:
    u, delta, A, B, C, D, z, delta_bias = inputs
    for name, x in zip(_NAMES, inputs):
        if x is None and name in ('D', 'z', 'delta_bias'):
            continue
        if not isinstance(x, Tensor):
            raise TypeError(
                f'selective_scan: {name} must be a tensor, not {type(x).__name__}'
            )
        if x.dtype not in _DTYPES:
            raise TypeError(
                f'selective_scan: {name} is {x.dtype}; float32, bfloat16, float16 '
                f'and float64 are supported (A is real here, complex A is not)'
            )
        if x.device != u.device:
            raise ValueError(
                f'selective_scan: {name} is on {x.device}, '
                f'u on {u.device}; move them together'
            )
    if u.ndim != 3:
        raise ValueError(
            f'selective_scan: u must be (batch, channels, length), got {tuple(u.shape)}'
        )
    if A.ndim != 2 or A.shape[0] != u.shape[1]:
        raise ValueError(
            f'selective_scan: A must be (channels, states) with '
            f'{u.shape[1]} channels as u has, got {tuple(A.shape)}'
        )
    batch, channels, length = u.shape
    states = A.shape[1]
    if not (batch and channels and length and states):
        raise ValueError(
            f'selective_scan: nothing to scan, u is {tuple(u.shape)} and A '
            f'{tuple(A.shape)}; batch, channels, length and states must be >= 1'
        )
    _check_weights(B, C, batch, channels, states, length)
    for name, x in (('delta', delta), ('z', z)):
        if x is not None and x.shape != u.shape:
            raise ValueError(
                f"selective_scan: {name} must have u's shape "
                f'{tuple(u.shape)}, got {tuple(x.shape)}'
            )
    for name, x in (('D', D), ('delta_bias', delta_bias)):
        if x is not None and x.shape != (channels,):
            raise ValueError(
                f'selective_scan: {name} must be ({channels},), one '
                f'for each channel of u, got {tuple(x.shape)}'
            )


def _check_weights(
    B: Tensor, C: Tensor, batch: int, channels: int, states: int, length: int
) -> None:
    if B.shape != C.shape:
        raise ValueError(
            f'selective_scan: B and C must have one shape, got '
            f'{tuple(B.shape)} and {tuple(C.shape)}'
        )
    groups = B.shape[1] if B.ndim == 4 else 1
    expected = (batch, groups, states, length)
    if B.ndim not in (3, 4) or tuple(B.shape) != expected[:1] + expected[5 - B.ndim :]:
        raise ValueError(
            f'selective_scan: B and C must be (batch, states, length) = '
            f'{(batch, states, length)} or (batch, groups, states, length), '
            f'got {tuple(B.shape)}'
        )
    if groups < 1 or channels % groups:
        raise ValueError(
            f'selective_scan: {groups} groups of B and C do not '
            f'divide the {channels} channels of u'
        )


# Registration with torch.library


@torch.library.custom_op('mmvssm::selective_scan', mutates_args=())
def _forward_op(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    return _forward(inputs, delta_softplus, out_dtype, backend, keep_states=True)


@_forward_op.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, out_dtype, backend):
    batch, channels, length = u.shape
    states = A.shape[1]
    state_dtype = torch.promote_types(u.dtype, torch.float32)
    saved = _IMPLEMENTATIONS[backend].saved_states_shape(
        batch, length, states, channels
    )
    return (
        torch.empty_like(u, dtype=out_dtype),
        u.new_empty(batch, channels, states, dtype=state_dtype),
        u.new_empty(saved, dtype=state_dtype),
    )


@torch.library.custom_op('mmvssm::selective_scan_backward', mutates_args=())
def _backward_op(
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
    backend: str,
) -> list[Tensor]:
    with autocast.disabled(u):
        grads = _IMPLEMENTATIONS[backend].backward(
            grad_out,
            grad_last_state,
            u,
            delta,
            A,
            B,
            C,
            D,
            z,
            delta_bias,
            saved,
            delta_softplus,
        )
    return [g for g in grads if g is not None]


@_backward_op.register_fake
def _(
    grad_out,
    grad_last_state,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    saved,
    delta_softplus,
    backend,
):
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    return [torch.empty_like(x) for x in inputs if x is not None]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_last_state, _):
    tensors = ctx.saved_tensors
    if grad_out is None and grad_last_state is None:
        return (None,) * 11
    found = iter(
        _backward_op(
            grad_out, grad_last_state, *tensors, ctx.delta_softplus, ctx.backend
        )
    )
    grads = [None if x is None else next(found) for x in tensors[:-1]]
    return (*grads, None, None, None)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
