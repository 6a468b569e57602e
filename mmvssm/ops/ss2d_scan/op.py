"""The core of VMamba's SS2D as one op (arXiv 2401.10166, section 4.3)."""

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from mmvssm.ops import autocast
from mmvssm.ops.backends import choose_backend
from mmvssm.ops.scan_orders import DEFAULT, Orders, count_orders
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
    orders: Orders = DEFAULT,
    backend: str | None = None,
) -> Tensor:
    """Scan a map along several orders with weights that depend on the input.

    Every one k of K scans projects the map to step sizes and to B and C, runs a
    selective scan with softplus over its own order of the places, and the K
    results are added up where they belong:
    Δ = softplus(W_dt,k W_x,k x + bias_k), y = Σ_k order_k⁻¹(scan_k(order_k(x))).
    The published K = 4 are rows, columns, and these from the end.

    At a padded place of an order x is zero. Its output is dropped, but the state
    decays there as it does at any place, with Δ = softplus(bias_k), B = C = 0.

    Args:
        x: Map (B, C, H, W), any strides; channels-last is the fast format.
        x_proj_weight: (K, R + 2N, C): of each scan first the R rows of the
            step size's low-rank form, then N of B, then N of C.
        dt_projs_weight: (K, C, R).
        dt_projs_bias: (K, C), added before the softplus.
        A: Decay rates (K * C, N), negative.
        Ds: Skip weights (K * C,).
        orders: A name of :func:`mmvssm.ops.list_scan_orders`, a function of
            height and width, or a list of these, see
            :func:`mmvssm.ops.scan_order`, which gives the K rows.
        backend: See :func:`mmvssm.ops.selective_scan`.

    Returns:
        The merged map (B, C, H, W), channels-last in memory, in x's dtype,
        under autocast in float32. State, accumulation and the sum over the
        scans are float32 (float64 for float64 input).

    Raises:
        TypeError: x is not floating-point, or a projection has another dtype
            than x outside autocast; ``orders`` is of no such type.
        ValueError: A shape does not fit, or there is no such scan order.
    """
    inputs = (x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds)
    if has_torch_function(inputs):
        # The FLOPs counter sees one op here, however it is computed.
        return handle_torch_function(
            ss2d_scan, inputs, *inputs, orders=orders, backend=backend
        )
    _check(*inputs, orders)
    name = choose_backend(x.device.type, x.dtype, backend, states=A.shape[1])
    if is_fused(name):
        return ss2d_scan_fused(*inputs, name, orders)
    return ss2d_scan_composed(*inputs, name, orders)


def _check(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    orders: Orders,
) -> None:
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
