"""Tensors that depend on the size of the map only, made once for each size."""

from collections.abc import Callable
from functools import lru_cache, wraps

import torch
from torch import Tensor, nn


def cached_table(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep the results of a function with hashable arguments, for the last few calls.

    The argument ``like`` is replaced by its device and dtype. While a graph is
    compiled,
    and for tensors without data, the function is called each time: its result cannot be
    used elsewhere then.
    """
    kept = lru_cache(maxsize=32)(make)

    @wraps(make)
    def table(*key, like: Tensor) -> Tensor:
        dtype = torch.promote_types(like.dtype, torch.float32)
        if torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter):
            return make(*key, like.device, dtype)
        # A table made without gradients must work in a later training, too.
        with torch.inference_mode(False):
            return kept(*key, like.device, dtype)

    table.cache_clear = kept.cache_clear
    table.cache_info = kept.cache_info
    return table
