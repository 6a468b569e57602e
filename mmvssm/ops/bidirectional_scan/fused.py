"""The bidirectional scan as one op of torch.library, for backends that fuse it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvssm.ops import autocast, checks, direct
from mmvssm.ops.bidirectional_scan import cpu_backend, triton_backend
from mmvssm.ops.bidirectional_scan.direction import Direction

_IMPLEMENTATIONS = {'cpu': cpu_backend, 'triton': triton_backend}
_HALF = len(Direction._fields)


def is_fused(backend: str, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the backend has the bidirectional scan in one piece.

    Args:
        backend: Its name.
        dtype: That of the projections.
    """
    return backend in _IMPLEMENTATIONS and dtype in _IMPLEMENTATIONS[backend].DTYPES


def projected_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which projections are computed."""
    if autocast.is_enabled(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def bidirectional_scan_fused(
    x: Tensor,
    z: Tensor,
    forward: Direction,
    backward: Direction,
    average: bool,
    backend: str,
) -> Tensor:
    """See :func:`mmvssm.ops.bidirectional_scan`."""
    out_dtype = torch.float32 if autocast.is_enabled(x) else x.dtype
    taps = max(way.conv_weight.shape[1] for way in (forward, backward))
    weights = [
        *_as_kernels_read(forward, taps, projected_dtype(x)),
        *_as_kernels_read(backward, taps, projected_dtype(x)),
    ]
    if z.dtype not in _IMPLEMENTATIONS[backend].DTYPES:
        z = z.float()
    x, z = x.mT, z.mT
    if direct.possible(x, z, *weights):
        out, *_ = _forward(x, z, weights, average, out_dtype, backend, False)
    else:
        out, *_ = _forward_op(x, z, weights, average, out_dtype, backend)
    return out.mT


def _forward(
    x: Tensor,
    z: Tensor,
    weights: Sequence[Tensor],
    average: bool,
    out_dtype: torch.dtype,
    backend: str,
    keep_states: bool,
) -> tuple[Tensor | None, ...]:
    """The output and what backward needs, its states only if asked for."""
    with autocast.disabled(x):
        out, y, projected, saved, has_nan = _IMPLEMENTATIONS[backend].forward(
            x, z, _directions(weights), average, out_dtype, keep_states
        )
    if has_nan:
        checks.refuse_nan('bidirectional_scan', _by_name(x, z, weights))
    return out, y, *projected, saved


def _as_kernels_read(weights: Direction, taps: int, dtype: torch.dtype) -> Direction:
    """Contiguous; float32, the matrices of that dtype; with that many taps."""
    matrices = ('x_proj_weight', 'dt_proj_weight')
    found = {
        name: tensor.to(dtype if name in matrices else torch.float32)
        for name, tensor in weights._asdict().items()
    }
    missing = taps - weights.conv_weight.shape[1]
    if missing:
        found['conv_weight'] = F.pad(found['conv_weight'], (missing, 0))
    return Direction(*(tensor.contiguous() for tensor in found.values()))


def _directions(weights: Sequence[Tensor]) -> tuple[Direction, Direction]:
    return Direction(*weights[:_HALF]), Direction(*weights[_HALF:])


def _by_name(x: Tensor, z: Tensor, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    inputs = {'x': x, 'z': z}
    for way, direction in zip(('forward', 'backward'), _directions(weights)):
        inputs |= {f'{way}.{name}': t for name, t in direction._asdict().items()}
    return inputs


@torch.library.custom_op('mmvssm::bidirectional_scan', mutates_args=())
def _forward_op(
    x: Tensor,
    z: Tensor,
    weights: Sequence[Tensor],
    average: bool,
    out_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _forward(x, z, weights, average, out_dtype, backend, keep_states=True)


@_forward_op.register_fake
def _(x, z, weights, average, out_dtype, backend):
    batch, length, channels = x.shape
    ways = _directions(weights)
    states = ways[0].A.shape[1]
    saved = _IMPLEMENTATIONS[backend].saved_shape(batch, length, states, channels)
    projected = [
        w.x_proj_weight.new_empty(batch, length, w.x_proj_weight.shape[0]) for w in ways
    ]
    return (
        x.new_empty(x.shape, dtype=out_dtype),
        x.new_empty(x.shape, dtype=torch.float32),
        *projected,
        x.new_empty(saved, dtype=torch.float32),
    )


@torch.library.custom_op('mmvssm::bidirectional_scan_backward', mutates_args=())
def _backward_op(
    grad_out: Tensor,
    x: Tensor,
    z: Tensor,
    weights: Sequence[Tensor],
    average: bool,
    y: Tensor,
    projected: Sequence[Tensor],
    saved: Tensor,
    backend: str,
) -> list[Tensor]:
    with autocast.disabled(x):
        grad_x, grad_z, grads = _IMPLEMENTATIONS[backend].backward(
            grad_out, x, z, _directions(weights), average, y, projected, saved
        )
    return [grad_x, grad_z, *grads[0], *grads[1]]


@_backward_op.register_fake
def _(grad_out, x, z, weights, average, y, projected, saved, backend):
    return [
        torch.empty_like(x),
        torch.empty_like(z),
        *(w.new_empty(w.shape) for w in weights),
    ]


def _setup_context(ctx, inputs, output):
    x, z, weights, ctx.average, _, ctx.backend = inputs
    ctx.save_for_backward(x, z, *weights, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, *_):
    if grad_out is None:
        return (None,) * 6
    x, z, *weights, y, forward, backward, saved = ctx.saved_tensors
    grad_x, grad_z, *grads = _backward_op(
        *(grad_out, x, z, weights, ctx.average),
        *(y, [forward, backward], saved, ctx.backend),
    )
    return grad_x, grad_z, grads, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
