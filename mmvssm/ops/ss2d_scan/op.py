"""The core of VMamba's SS2D as one op (arXiv 2401.10166, section 4.3)."""

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from mmvssm.ops import autocast
from mmvssm.ops.backends import choose_backend
from mmvssm.ops.ss2d_scan.composed import ss2d_scan_composed
from mmvssm.ops.ss2d_scan.fused import is_fused, ss2d_scan_fused


def ss2d_scan(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Scan a map along four routes with weights that depend on the input.

    Every route k projects the map to step sizes and to B and C, runs a
    selective scan with softplus over its own order of the positions, and the
    four results are added up where they belong:
    Δ = softplus(W_dt,k W_x,k x + bias_k), y = Σ_k route_k⁻¹(scan_k(route_k(x))).

    Args:
        x: Map (B, C, H, W), any strides; channels-last is the fast format.
        x_proj_weight: (4, R + 2N, C): of each route first the R rows of the
            step size's low-rank form, then N of B, then N of C.
        dt_projs_weight: (4, C, R).
        dt_projs_bias: (4, C), added before the softplus.
        A: Decay rates (4 * C, N), negative.
        Ds: Skip weights (4 * C,).
        backend: See :func:`mmvssm.ops.selective_scan`.

    Returns:
        The merged map (B, C, H, W), channels-last in memory, in x's dtype,
        under autocast in float32. State, accumulation and the sum over the
        routes are float32 (float64 for float64 input).

    Raises:
        TypeError: x is not floating-point, or a projection has another dtype
            than x outside autocast.
        ValueError: A shape does not fit.
    """
    inputs = (x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds)
    if has_torch_function(inputs):
        # The FLOPs counter sees one op here, however it is computed.
        return handle_torch_function(ss2d_scan, inputs, *inputs, backend=backend)
    _check(*inputs)
    name = choose_backend(x.device.type, x.dtype, backend, states=A.shape[1])
    if is_fused(name):
        return ss2d_scan_fused(*inputs, name)
    return ss2d_scan_composed(*inputs, name)


def _check(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
) -> None:
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(
            f'ss2d_scan: x must be (batch, channels, height, width) '
            f'with no empty side, got {tuple(x.shape)}'
        )
    if not x.is_floating_point():
        raise TypeError(f'ss2d_scan: x must be floating-point, got {x.dtype}')
    if A.ndim != 2 or dt_projs_weight.ndim != 3:
        raise ValueError(
            f'ss2d_scan: A must be (4 * channels, states) and dt_projs_weight (4, '
            f'channels, rank), got {tuple(A.shape)}, {tuple(dt_projs_weight.shape)}'
        )
    channels, rank, states = x.shape[1], dt_projs_weight.shape[2], A.shape[1]
    expected = {
        'x_proj_weight': (x_proj_weight, (4, rank + 2 * states, channels)),
        'dt_projs_weight': (dt_projs_weight, (4, channels, rank)),
        'dt_projs_bias': (dt_projs_bias, (4, channels)),
        'A': (A, (4 * channels, states)),
        'Ds': (Ds, (4 * channels,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f'ss2d_scan: {name} must be {shape} for {channels} channels, rank '
                f'{rank} and {states} states, got {tuple(tensor.shape)}'
            )
    for name in ('x_proj_weight', 'dt_projs_weight'):
        dtype = expected[name][0].dtype
        if dtype != x.dtype and not autocast.is_enabled(x):
            raise TypeError(
                f'ss2d_scan: {name} is {dtype} and x is {x.dtype}; convert one of '
                f'them, or run under torch.autocast'
            )
