"""SS2D's core as one op of torch.library, for backends that fuse it.

Only the projection of the map to step sizes, B and C stays outside: it is one
matrix product in the order of the image. The kernels then read the map and the
projections along the scan orders, by index arithmetic along the four routes of
VMamba and by a table along others, so that no copy of the map is made for a scan.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmvssm.ops import autocast, checks, direct
from mmvssm.ops.scan_orders import DEFAULT, KernelOrders, Orders, kernel_orders
from mmvssm.ops.ss2d_scan import cpu_backend, cuda_backend, triton_backend
from mmvssm.ops.ss2d_scan.project import project_map

_IMPLEMENTATIONS = {
    'cpu': cpu_backend,
    'triton': triton_backend,
    'cuda': cuda_backend,
}
_NAMES = ('x', 'the projections of x', 'dt_projs_weight', 'dt_projs_bias', 'A', 'Ds')


def is_fused(backend: str) -> bool:
    """Whether the backend has SS2D in one piece."""
    return backend in _IMPLEMENTATIONS


def ss2d_scan_fused(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    backend: str,
    orders: Orders = DEFAULT,
) -> Tensor:
    """See :func:`mmvssm.ops.ss2d_scan`."""
    walked = kernel_orders(orders, *x.shape[2:], x.device)
    maps = x.permute(0, 2, 3, 1)
    projected = project_map(maps, x_proj_weight)
    out_dtype = torch.float32 if autocast.is_enabled(x) else x.dtype
    read = _IMPLEMENTATIONS[backend].DTYPES
    maps, projected = (t if t.dtype in read else t.float() for t in (maps, projected))
    inputs = (
        maps.contiguous(),
        projected,
        *(t.float().contiguous() for t in (dt_projs_weight, dt_projs_bias, A, Ds)),
    )
    written = out_dtype if out_dtype in read else torch.float32
    if direct.possible(*inputs):
        y, _ = _forward(inputs, walked, written, backend, keep_states=False)
    else:
        y, _ = _forward_op(*inputs, walked.table, [*walked.routes], written, backend)
    return y.to(out_dtype).permute(0, 3, 1, 2)


def _forward(
    inputs: tuple[Tensor, ...],
    orders: KernelOrders,
    out_dtype: torch.dtype,
    backend: str,
    keep_states: bool,
) -> tuple[Tensor, Tensor | None]:
    """The merged map and, if asked for, what backward needs."""
    with autocast.disabled(inputs[0]):
        out, saved, has_nan = _IMPLEMENTATIONS[backend].forward(
            *inputs, orders, out_dtype, keep_states
        )
    if has_nan:
        checks.refuse_nan('ss2d_scan', dict(zip(_NAMES, inputs)))
    return out, saved


@torch.library.custom_op('mmvssm::ss2d_scan', mutates_args=())
def _forward_op(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    table: Tensor | None,
    routes: Sequence[int],
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    inputs = (x, projected, dt_weight, dt_bias, A, Ds)
    orders = KernelOrders(tuple(routes), table)
    return _forward(inputs, orders, out_dtype, backend, keep_states=True)


@_forward_op.register_fake
def _(x, projected, dt_weight, dt_bias, A, Ds, table, routes, out_dtype, backend):
    batch, height, width, channels = x.shape
    positions = KernelOrders(tuple(routes), table).positions(height * width)
    saved = _IMPLEMENTATIONS[backend].saved_states_shape(
        len(routes), batch, positions, A.shape[1], channels
    )
    return (
        torch.empty_like(x, dtype=out_dtype),
        x.new_empty(saved, dtype=torch.float32),
    )


@torch.library.custom_op('mmvssm::ss2d_scan_backward', mutates_args=())
def _backward_op(
    grad_out: Tensor,
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    table: Tensor | None,
    saved: Tensor,
    routes: Sequence[int],
    backend: str,
) -> list[Tensor]:
    inputs = (x, projected, dt_weight, dt_bias, A, Ds)
    orders = KernelOrders(tuple(routes), table)
    with autocast.disabled(x):
        return _IMPLEMENTATIONS[backend].backward(
            grad_out.contiguous(), *inputs, orders, saved
        )


@_backward_op.register_fake
def _(grad_out, x, projected, dt_weight, dt_bias, A, Ds, table, saved, routes, backend):
    inputs = (x, projected, dt_weight, dt_bias, A, Ds)
    return [t.new_empty(t.shape) for t in inputs]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.routes, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, _):
    if grad_out is None:
        return (None,) * 10
    found = _backward_op(grad_out, *ctx.saved_tensors, ctx.routes, ctx.backend)
    return (*found, None, None, None, None)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
