"""Ops out of other ops, to compare what a backend fuses with."""

from collections.abc import Callable

from torch import Tensor

from mmvssm.ops.operator import public_ops


def unfused(function: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    """The public op ``function`` composed of others, which are the backend's."""
    composed = public_ops[function].composed(backend)
    return lambda *args, **kwargs: composed(*args, **kwargs)[0]


def is_fused(function: Callable[..., Tensor], backend: str) -> bool:
    """Whether the backend has the op in one piece."""
    return backend in public_ops[function].backends and backend not in (
        'torch',
        'reference',
    )
