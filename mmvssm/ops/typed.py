"""Helpers with types where torch's own functions have none."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

P = ParamSpec('P')
R = TypeVar('R')
# For functions that return a tensor for a tensor, and None for None.
MaybeTensor = TypeVar('MaybeTensor', Tensor, Tensor | None)


def assume_constant_result(function: Callable[P, R]) -> Callable[P, R]:
    """Make torch.compile call a function once, instead of tracing it."""
    marked: Callable[P, R] = torch.compiler.assume_constant_result(function)
    return marked


def apply(function: type[Function], *arguments: Any) -> Tensor:
    """Apply an autograd function that returns one tensor."""
    found: Tensor = function.apply(*arguments)
    return found


def is_tracing() -> bool:
    """Whether torch.jit.trace is active."""
    # torch.compile cannot ask the second question.
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def sole(grads: tuple[Tensor | None, ...]) -> Tensor:
    """The gradient of an op's only output; there is no backward pass without it."""
    (grad,) = grads
    assert grad is not None
    return grad
