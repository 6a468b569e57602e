"""Gradients as autograd wants them."""

from collections.abc import Iterable

import torch
from torch import Tensor


def like_inputs(
    gradients: Iterable[Tensor | None], inputs: Iterable[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients with the dtypes and strides of the inputs, None where those are."""
    return tuple(
        None if x is None else _like(gradient, x)
        for gradient, x in zip(gradients, inputs, strict=True)
    )


def _like(gradient: Tensor, x: Tensor) -> Tensor:
    if gradient.dtype == x.dtype and gradient.stride() == x.stride():
        return gradient
    return torch.empty_like(x).copy_(gradient)
