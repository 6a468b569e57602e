"""Tensors that follow from the size of the map alone, made once a size."""

from collections.abc import Callable
from functools import lru_cache, wraps

import torch
from torch import Tensor, nn


def cached_table(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep what a function of hashable arguments made for the last few of them.

    The function gets the device and dtype of the argument ``like`` in its
    place. Inside a graph that is being compiled, and for tensors without data,
    it is called each time: what it makes then cannot be used elsewhere.
    """
    kept = lru_cache(maxsize=32)(make)

    @wraps(make)
    def table(*key, like: Tensor) -> Tensor:
        dtype = torch.promote_types(like.dtype, torch.float32)
        if torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter):
            return make(*key, like.device, dtype)
        # A table of a forward pass without gradients serves training, too.
        with torch.inference_mode(False):
            return kept(*key, like.device, dtype)

    table.cache_clear = kept.cache_clear
    table.cache_info = kept.cache_info
    return table
