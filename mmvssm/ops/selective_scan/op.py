"""The public selective scan."""

import torch
from torch import Tensor

from mmvssm.ops import autocast, backends
from mmvssm.ops.contract import Call
from mmvssm.ops.selective_scan.cpu_backend import CpuScan
from mmvssm.ops.selective_scan.cuda_backend import CudaScan
from mmvssm.ops.selective_scan.declaration import (
    SELECTIVE_SCAN,
    ScanInputs,
    ScanOptions,
)
from mmvssm.ops.selective_scan.mamba_ssm_backend import MambaSsmScan
from mmvssm.ops.selective_scan.reference import ReferenceScan
from mmvssm.ops.selective_scan.torch_backend import TorchScan

SELECTIVE_SCAN.supply(
    CpuScan(),
    CudaScan(),
    MambaSsmScan(),
    TorchScan(backends.TORCH),
    ReferenceScan(),
    composed=lambda name: TorchScan(backends.suppliers[name]),
)


def _result(
    outputs: tuple[Tensor, ...], options: ScanOptions
) -> Tensor | tuple[Tensor, Tensor]:
    out, last_state = outputs
    return (out, last_state) if options.return_last_state else out


@SELECTIVE_SCAN.public(finish=_result)
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
) -> Call:
    r"""Selective scan of Mamba (`arXiv 2312.00752`_, section 3.2).

    With Δ = softplus(delta + delta_bias) (the softplus optional), for every
    batch element, channel and position

    .. math::
        h_t = \exp(\Delta_t A) h_{t-1} + \Delta_t B_t u_t, \quad
        y_t = (C_t \cdot h_t + D u_t) \, \mathrm{SiLU}(z_t)

    where h is a vector of N states that starts at zero. A is discretised by zero-order
    hold, and B by an Euler step, as in the published kernels; the articles' equations
    have zero-order hold for both (docs/theory.md). State and accumulation are
    float32 (float64 for float64 inputs). Tensors may have any strides, and the output
    has those of ``u``. Channels-last tensors, (B, L, D) in memory, are the fastest on
    the CPU.

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
        backend: One of :func:`mmvssm.ops.list_backends`. By default the device and
            dtype of ``u`` decide.

    Returns:
        The output (B, D, L) in u's dtype, under autocast in float32. With
        ``return_last_state`` a pair with the last state (B, D, N), float32.

    Raises:
        TypeError: An argument is not a tensor of a supported dtype.
        ValueError: Shapes or devices do not fit, a dimension is empty, the
            backend is unknown, or (on the CPU) an input has NaN.
        BackendUnavailableError: The named backend cannot run.
        RuntimeError: (``mamba_ssm``, in the backward pass) The loss depends on the last
            state.

    .. _arXiv 2312.00752: https://arxiv.org/abs/2312.00752
    """
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias)
    _check(inputs)
    out_dtype = u.dtype
    if autocast.is_enabled(u):
        out_dtype = torch.promote_types(u.dtype, torch.float32)
    if B.ndim == 3:
        inputs = inputs._replace(B=B.unsqueeze(1), C=C.unsqueeze(1))
    options = ScanOptions(delta_softplus, out_dtype, return_last_state)
    return Call(inputs, options, backend, A.shape[1], return_last_state)


# The checks


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check(inputs: ScanInputs) -> None:
    u, delta, A, B, C, D, z, delta_bias = inputs
    for name, x in inputs._asdict().items():
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
