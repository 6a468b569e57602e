"""SS2D's core as one op of torch.library, for backends that fuse it.

Only the projection of the map to step sizes, B and C stays outside: it is one
matrix product in the order of the image. The kernels then read the map and the
projections along the four routes by index arithmetic, so that no copy of the
map is made for a route.
"""

import torch
from torch import Tensor

from mmvssm.ops import autocast, checks, direct
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
) -> Tensor:
    """See :func:`mmvssm.ops.ss2d_scan`."""
    maps = x.permute(0, 2, 3, 1)
    projected = project_map(maps, x_proj_weight, backend)
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
        y, _ = _forward(inputs, written, backend, keep_states=False)
    else:
        y, _ = _forward_op(*inputs, written, backend)
    return y.to(out_dtype).permute(0, 3, 1, 2)


def _forward(
    inputs: tuple[Tensor, ...],
    out_dtype: torch.dtype,
    backend: str,
    keep_states: bool,
) -> tuple[Tensor, Tensor | None]:
    """The merged map and, if asked for, what backward needs."""
    with autocast.disabled(inputs[0]):
        out, saved, has_nan = _IMPLEMENTATIONS[backend].forward(
            *inputs, out_dtype, keep_states
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
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    inputs = (x, projected, dt_weight, dt_bias, A, Ds)
    return _forward(inputs, out_dtype, backend, keep_states=True)


@_forward_op.register_fake
def _(x, projected, dt_weight, dt_bias, A, Ds, out_dtype, backend):
    batch, height, width, channels = x.shape
    saved = _IMPLEMENTATIONS[backend].saved_states_shape(
        batch, height * width, A.shape[1], channels
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
    saved: Tensor,
    backend: str,
) -> list[Tensor]:
    with autocast.disabled(x):
        return _IMPLEMENTATIONS[backend].backward(
            grad_out.contiguous(), x, projected, dt_weight, dt_bias, A, Ds, saved
        )


@_backward_op.register_fake
def _(grad_out, x, projected, dt_weight, dt_bias, A, Ds, saved, backend):
    inputs = (x, projected, dt_weight, dt_bias, A, Ds)
    return [t.new_empty(t.shape) for t in inputs]


def _setup_context(ctx, inputs, output):
    *tensors, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, _):
    if grad_out is None:
        return (None,) * 8
    return (*_backward_op(grad_out, *ctx.saved_tensors, ctx.backend), None, None)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
