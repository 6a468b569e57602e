"""Scan orders of recorded calls.

Another process knows the scan orders of this package by their names. It does not know
orders that a program has registered or passed as functions. A shuffled order with as
many
rows takes their place: kernels read it from a table, too.
"""

import torch
from torch import Tensor

from mmvssm.ops.scan_orders import builtin, count_orders
from mmvssm.ops.scan_orders.registry import OrderFunction, _functions
from mmvssm.ops.scan_orders.tables import name_orders, orders_of

_SHUFFLED = 'shuffled '


def portable(word: str) -> str:
    """A word that has the same meaning, or a similar one, in every process.

    Args:
        word: A word of ``order_word``.
    """
    function = _functions.get(word)
    own = function is not None and function.__module__ == builtin.__name__
    if own or word.startswith(_SHUFFLED):
        return word
    return f'{_SHUFFLED}{count_orders(orders_of(word), 1, 1)}'


def make_known(word: str) -> None:
    """Register a word of :func:`portable`, so that ops understand it."""
    if word.startswith(_SHUFFLED):
        name_orders(word, _shuffled(int(word.removeprefix(_SHUFFLED))))


def _shuffled(rows: int) -> OrderFunction:
    def orders(height: int, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        places = height * width
        every = [torch.randperm(places, generator=generator) for _ in range(rows)]
        return torch.stack(every)

    return orders
