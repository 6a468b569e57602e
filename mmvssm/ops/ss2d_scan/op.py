"""The core of VMamba's SS2D (arXiv 2401.10166, section 4.3)."""

import torch
from torch import Tensor

from mmvssm.ops import autocast, backends
from mmvssm.ops.contract import Call
from mmvssm.ops.scan_orders import DEFAULT, Orders, count_orders
from mmvssm.ops.scan_orders.tables import order_word
from mmvssm.ops.ss2d_scan.composed import ComposedSs2d
from mmvssm.ops.ss2d_scan.cpu_backend import CpuSs2d
from mmvssm.ops.ss2d_scan.cuda_backend import CudaSs2d
from mmvssm.ops.ss2d_scan.declaration import SS2D_SCAN, Ss2dInputs, Ss2dOptions
from mmvssm.ops.ss2d_scan.reference import ReferenceSs2d

SS2D_SCAN.supply(
    CpuSs2d(),
    CudaSs2d(),
    ReferenceSs2d(),
    composed=lambda name: ComposedSs2d(backends.suppliers[name]),
)


def _result(outputs: tuple[Tensor, ...], options: Ss2dOptions) -> Tensor:
    return outputs[0]


@SS2D_SCAN.public(finish=_result)
def ss2d_scan(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    *,
    orders: Orders = DEFAULT,
    backend: str | None = None,
) -> Call:
    """Scan a map along several orders with weights that depend on the input.

    There are K scans. Scan k projects the map to step sizes, B and C, and runs a
    selective scan with softplus along row k of the scan order. The results are put back
    to their places and added up:
    Δ = softplus(W_dt,k W_x,k x + bias_k), y = Σ_k order_k⁻¹(scan_k(order_k(x))).
    The published K = 4 scans go by rows, by columns, and by both from the end.

    At a padded place x is zero. The output is dropped there, but the state decays as at
    any other place, with Δ = softplus(bias_k), B = C = 0.

    Args:
        x: Map (B, C, H, W), any strides; channels-last memory is the fastest.
        x_proj_weight: (K, R + 2N, C): for each scan first the R rows of the low-rank
            step sizes, then N rows of B, then N rows of C.
        dt_projs_weight: (K, C, R).
        dt_projs_bias: (K, C), added before the softplus.
        A: Decay rates (K * C, N), negative.
        Ds: Skip weights (K * C,).
        orders: A name of :func:`mmvssm.ops.list_scan_orders`, a function of height and
            width, or a list of these. :func:`mmvssm.ops.scan_order` gives the K rows.
        backend: See :func:`mmvssm.ops.selective_scan`.

    Returns:
        The merged map (B, C, H, W), channels-last in memory, in x's dtype,
        under autocast in float32. State, accumulation and the sum over the
        scans are float32 (float64 for float64 input).

    Raises:
        TypeError: x is not floating-point, or a projection has another dtype
            than x outside autocast; or ``orders`` has a wrong type.
        ValueError: A shape does not fit, or there is no such scan order.
    """
    inputs = Ss2dInputs(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds)
    _check(inputs, orders)
    out_dtype = projected_dtype = x.dtype
    if autocast.is_enabled(x):
        out_dtype = torch.promote_types(x.dtype, torch.float32)
        projected_dtype = torch.get_autocast_dtype(x.device.type)
    options = Ss2dOptions(order_word(orders), out_dtype, projected_dtype)
    return Call(inputs, options, backend, states=A.shape[1])


def _check(inputs: Ss2dInputs, orders: Orders) -> None:
    x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds = inputs
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(
            f'ss2d_scan: x must be (batch, channels, height, width) '
            f'with no empty side, got {tuple(x.shape)}'
        )
    if not x.is_floating_point():
        raise TypeError(f'ss2d_scan: x must be floating-point, got {x.dtype}')
    count = count_orders(orders, *x.shape[2:])
    if A.ndim != 2 or dt_projs_weight.ndim != 3:
        raise ValueError(
            f'ss2d_scan: A must be ({count} * channels, states) and dt_projs_weight '
            f'({count}, channels, rank), got {tuple(A.shape)}, '
            f'{tuple(dt_projs_weight.shape)}'
        )
    channels, rank, states = x.shape[1], dt_projs_weight.shape[2], A.shape[1]
    expected = {
        'x_proj_weight': (x_proj_weight, (count, rank + 2 * states, channels)),
        'dt_projs_weight': (dt_projs_weight, (count, channels, rank)),
        'dt_projs_bias': (dt_projs_bias, (count, channels)),
        'A': (A, (count * channels, states)),
        'Ds': (Ds, (count * channels,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f'ss2d_scan: {name} must be {shape} for {count} scans of {channels} '
                f'channels, rank {rank} and {states} states, got {tuple(tensor.shape)}'
            )
    for name in ('x_proj_weight', 'dt_projs_weight'):
        dtype = expected[name][0].dtype
        if dtype != x.dtype and not autocast.is_enabled(x):
            raise TypeError(
                f'ss2d_scan: {name} is {dtype} and x is {x.dtype}; convert one of '
                f'them, or run under torch.autocast'
            )
