"""Tensors that depend on the size of the map only, made once for each size."""

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps

import torch
from torch import Tensor, nn

from mmvssm.ops.typed import is_tracing


def work_place(
    device: torch.device, dtype: torch.dtype
) -> tuple[torch.device, torch.dtype]:
    """Where to compute a table, and in which dtype.

    Eagerly in float64, on the CPU because some devices do not have it. The runtimes
    that graphs are exported to may not have it either: a graph computes a table in its
    own dtype.
    """
    if torch.compiler.is_compiling():
        return device, dtype
    return torch.device('cpu'), torch.float64


def are_equal(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two sizes are equal; in a graph for all sizes, whether they always are.

    A plain comparison would tie the graph to the sizes where it comes out the same.
    """
    if is_tracing():
        return False
    if not torch.compiler.is_compiling():
        return first == second
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return all(statically_known_true(a == b) for a, b in zip(first, second))


def cached_table(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep the results of a function with hashable arguments, for the last few calls.

    The argument ``like`` is replaced by its device and dtype. While a graph is traced
    or compiled, and for tensors without data, the function is called each time: its
    result cannot be used elsewhere then.
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
