"""The tables of scan orders on the device where they are read."""

from functools import lru_cache
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from mmvssm.ops.scan_orders.registry import (
    NO_ROUTE,
    Key,
    Orders,
    is_cross,
    key_of,
    real_tensors,
    routes_of,
    table_of,
)
from mmvssm.ops.typed import assume_constant_result


class KernelOrders(NamedTuple):
    """A scan order in the form that kernels need.

    Attributes:
        routes: For each row the number of the route of VMamba that it is, or
            ``NO_ROUTE``. Kernels compute the places of a route.
        table: int32 (K, L) as in :func:`scan_order`, on the device of the map;
            None if every row is a route.
    """

    routes: tuple[int, ...]
    table: Tensor | None

    def positions(self, places: int) -> int:
        """Positions of the longest row, on a map with that many places."""
        return places if self.table is None else self.table.shape[1]

    def route(self, k: int) -> int:
        """The route of row k; 0 if it is none."""
        return max(self.routes[k], 0)

    def row(self, k: int) -> Tensor | None:
        """Row k of the table, None for a route."""
        if self.table is None or self.routes[k] != NO_ROUTE:
            return None
        return self.table[k]


_CROSS = KernelOrders((0, 1, 2, 3), None)


def kernel_orders(
    orders: Orders, height: int, width: int, device: torch.device
) -> KernelOrders:
    """The scan order for the kernels of a device."""
    if is_cross(orders):
        # Needs no table: sizes may be symbols of torch.compile.
        return _CROSS
    # index() makes numbers of these symbols.
    size = index(height), index(width)
    routes = routes_of(key_of(orders), *size)
    table = None
    if NO_ROUTE in routes:
        table = device_table('kernels', orders, *size, device)
    return KernelOrders(routes, table)


def device_table(
    kind: str, orders: Orders, height: int, width: int, device: torch.device
) -> Tensor:
    """A table of a scan order, made once for each size and device.

    Args:
        kind: ``'kernels'``: like :func:`mmvssm.ops.scan_order`, in int32.
            ``'places'``: the same, with height * width instead of -1. ``'positions'``:
            the position of each place in each row, (K, height * width).
        orders: See :func:`mmvssm.ops.scan_order`.
        height, width: Of the map.
        device: Device of the table.
    """
    key = key_of(orders)
    if torch.compiler.is_dynamo_compiling():
        # As a constant, torch would use the table of one size for other sizes, too.
        made: Tensor = _table_op(order_word(key), kind, height, width, device)
        return made
    table = _kept_table(kind, key, height, width, device)
    # Modes that watch torch's dispatcher must know every tensor that they meet.
    watched = torch._C._len_torch_dispatch_stack()
    found: Tensor = torch.ops.aten.lift_fresh(table) if watched else table
    return found


@lru_cache(maxsize=256)
def _kept_table(
    kind: str, key: Key, height: int, width: int, device: torch.device
) -> Tensor:
    places = height * width
    with real_tensors():
        table = table_of(key, height, width)
        if kind == 'kernels':
            table = table.to(torch.int32)
        else:
            table = table.where(table >= 0, places)
        if kind == 'positions':
            # Sorted by place, padded places come last.
            table = table.argsort(dim=1, stable=True)[:, :places].contiguous()
        return table.to(device)


# For tables inside torch.compile. Operators take strings, but orders may be functions.
_keys: dict[str, Key] = {}


@assume_constant_result
def order_word(orders: Orders) -> str:
    """A word (a string) for these orders, which :func:`orders_of` understands."""
    key = key_of(orders)
    if isinstance(key, str):
        return key
    token = str(key)
    _keys[token] = key
    return token


def name_orders(word: str, orders: Orders) -> None:
    """Register the word for these orders, if it is not registered yet."""
    _keys.setdefault(word, key_of(orders))


@torch.library.custom_op('mmvssm::scan_order', mutates_args=())
def _table_op(
    token: str, kind: str, height: int, width: int, device: torch.device
) -> Tensor:
    # A copy, because torch.compile may write to the result of an operator.
    return _kept_table(kind, orders_of(token), height, width, device).clone()


@_table_op.register_fake
def _(token: str, kind: str, height: int, width: int, device: torch.device) -> Tensor:
    table = _kept_table(kind, orders_of(token), height, width, torch.device('cpu'))
    return torch.empty(table.shape, dtype=table.dtype, device=device)


def orders_of(token: str) -> Key:
    """The orders of a word. In another process a name means the order of that name."""
    return _keys.get(token, token)
