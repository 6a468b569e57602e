"""The linear layer, which takes about half of the time of these models."""

import torch
from torch import Tensor

from mmvssm.ops import autocast, backends
from mmvssm.ops.contract import Call
from mmvssm.ops.linear.declaration import LINEAR, LinearInputs, LinearOptions
from mmvssm.ops.linear.product_backend import ProductBackend
from mmvssm.ops.linear.torch_backend import TorchLinear

LINEAR.supply(
    ProductBackend(backends.CPU),
    ProductBackend(backends.TORCH),
    TorchLinear(backends.REFERENCE),
    composed=lambda name: TorchLinear(backends.suppliers[name]),
)


def _result(outputs: tuple[Tensor, ...], options: LinearOptions) -> Tensor:
    return outputs[0]


@LINEAR.public(finish=_result)
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Call:
    """x weightᵀ + bias; on the CPU by the faster one of torch's two libraries.

    Args:
        x: (..., K).
        weight: (N, K), of x's dtype outside autocast.
        bias: (N,), of x's dtype outside autocast.
        backend: See :func:`mmvssm.ops.selective_scan`. For float32 on the CPU, ``cpu``
            and ``torch`` use oneDNN, with the same bits at any number of threads. All
            other calls are ``torch.nn.functional.linear``.

    Returns:
        (..., N).

    Raises:
        ValueError: Shapes or dtypes do not fit together.
    """
    if autocast.is_enabled(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        bias = None if bias is None else bias.to(dtype)
        x, weight = x.to(dtype), weight.to(dtype)
    _check(x, weight, bias)
    return Call(LinearInputs(x, weight, bias), LinearOptions(False), backend)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    # oneDNN does not check this, and would read past the end of a short tensor.
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            'linear: x must be (..., K) and weight (N, K), '
            f'got {tuple(x.shape)} and {tuple(weight.shape)}'
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f'linear: bias must be ({weight.shape[0]},) because weight is '
            f'{tuple(weight.shape)}, got {tuple(bias.shape)}'
        )
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(
            f'linear: weight and bias must have the dtype of x, {x.dtype}, '
            f'got {weight.dtype} and {None if bias is None else bias.dtype}'
        )


def deterministic_call(x: Tensor, weight: Tensor) -> Call:
    """x weightᵀ, on the CPU with the same bits at any number of threads.

    For other ops, which call it through ``LINEAR.route``.

    Args:
        x: (..., K).
        weight: (N, K) of the same dtype.
    """
    return Call(LinearInputs(x, weight, None), LinearOptions(True), 'torch')
