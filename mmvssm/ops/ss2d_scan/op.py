"""The core of VMamba's SS2D as one op (arXiv 2401.10166, section 4.3)."""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from mmvssm.ops.cross_scan import cross_merge, cross_scan, take_routes
from mmvssm.ops.cross_scan.op import NUM_ROUTES
from mmvssm.ops.selective_scan.op import scan


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
        ValueError: A shape does not fit.
    """
    inputs = (x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds)
    if has_torch_function(inputs):
        # The FLOPs counter sees one op here, however it is computed.
        return handle_torch_function(ss2d_scan, inputs, *inputs, backend=backend)
    _check(*inputs)
    batch, channels, height, width = x.shape
    rank, states = dt_projs_weight.shape[2], A.shape[1]

    # A position's projections do not depend on the route to it: project the map
    # once and then read the result, which is smaller than x, along the routes.
    projected = _project(x.permute(0, 2, 3, 1), x_proj_weight.flatten(0, 1))
    projected = projected.unflatten(-1, (NUM_ROUTES, -1))
    sequences = take_routes(projected.unbind(3))  # (B, L, 4, R + 2N)
    dt, B, C = sequences.split((rank, states, states), dim=-1)
    delta = torch.einsum('blkr,kcr->bkcl', dt, dt_projs_weight)
    ys, _ = scan(
        cross_scan(x).flatten(1, 2), delta.flatten(1, 2), A,
        B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1), Ds, None,
        dt_projs_bias.flatten(), True, float32_out=True, backend=backend)
    y = cross_merge(ys.unflatten(1, (NUM_ROUTES, channels)), (height, width))
    if not torch.is_autocast_enabled(x.device.type):
        y = y.to(x.dtype)
    return y.unflatten(2, (height, width))


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., C) times weight (M, C): (..., M).

    The matrix product may give each thread some of the M columns. Whole
    vectors of 16 keep the bits the same at any number of threads.
    """
    rows = weight.shape[0]
    return F.linear(x, F.pad(weight, (0, 0, 0, -rows % 16)))[..., :rows]


def _check(x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor,
           dt_projs_bias: Tensor, A: Tensor, Ds: Tensor) -> None:
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f'ss2d_scan: x must be (batch, channels, height, width) '
                         f'with no empty side, got {tuple(x.shape)}')
    if A.ndim != 2 or dt_projs_weight.ndim != 3:
        raise ValueError(
            f'ss2d_scan: A must be (4 * channels, states) and dt_projs_weight (4, '
            f'channels, rank), got {tuple(A.shape)}, {tuple(dt_projs_weight.shape)}')
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
                f'{rank} and {states} states, got {tuple(tensor.shape)}')
