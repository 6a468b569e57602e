"""Scan orders by name, and the tables that they are.

A scan order says in which order a scan visits the places of a map. It is data:
a table of K rows, one for each scan over the map, of L numbers of places (row by
row from 0 on), where -1 stands for a padded place.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from operator import index
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mmvssm.ops.typed import assume_constant_result

OrderFunction: TypeAlias = Callable[[int, int], Tensor | Sequence[Sequence[int]]]
Orders: TypeAlias = str | OrderFunction | Sequence[str | OrderFunction]
# Orders as one value that can be looked up.
Key: TypeAlias = str | OrderFunction | tuple[Any, ...]

DEFAULT = 'cross'
# Rows of these four are walked by arithmetic, without a table: VMamba's routes.
NUM_ROUTES = 4
# Of a row that is none of them.
NO_ROUTE = -1
_functions: dict[str, OrderFunction] = {}


def register_scan_order(name: str) -> Callable[[OrderFunction], OrderFunction]:
    """Give a scan order a name, which ``orders=`` then takes everywhere.

    Decorates a function of the height and width of a map. It returns K rows of
    L >= height * width numbers, as an integer tensor (K, L) or nested lists. Each
    row has every place of the map, 0 to height * width - 1, exactly once, and -1
    everywhere else: a padded place, see ``docs/scan_orders.md``. What it returns
    is checked at its first use on a map of that size, and kept.

    Args:
        name: Not in :func:`list_scan_orders` yet.

    Raises:
        ValueError: The name is taken.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f'the name of a scan order must be a word, not {name!r}')
    if name in _functions:
        raise ValueError(f"there is a scan order '{name}' already; take another name")

    def register(function: OrderFunction) -> OrderFunction:
        _functions[name] = function
        return function

    return register


def list_scan_orders() -> list[str]:
    """Names of all scan orders, sorted."""
    return sorted(_functions)


def scan_order(orders: Orders, height: int, width: int) -> Tensor:
    """The table of a scan order on a map.

    Args:
        orders: A name of :func:`list_scan_orders`, a function as
            :func:`register_scan_order` takes it, or several of these in a list:
            the rows of one after those of the other, the shorter ones filled up
            with -1 at their ends.
        height, width: Of the map, at least 1.

    Returns:
        int64 (K, L), on the CPU: numbers of places, row by row of the map from
        0 on, -1 for a padded place.

    Raises:
        ValueError: There is no scan order of that name, or a function does not
            give rows with every place once.
        TypeError: ``orders`` is none of these.
    """
    return table_of(key_of(orders), int(height), int(width)).clone()


def count_orders(orders: Orders, height: int, width: int) -> int:
    """K, the number of scans."""
    if is_cross(orders):
        return NUM_ROUTES
    # index() makes numbers of the symbols that torch.compile has for sizes.
    return len(routes_of(key_of(orders), index(height), index(width)))


def is_cross(orders: Orders) -> bool:
    """Whether these are the published four."""
    return isinstance(orders, str) and orders == DEFAULT


def key_of(orders: Orders) -> Key:
    """The orders as one value that can be looked up."""
    if isinstance(orders, (list, tuple)):
        return tuple(key_of(order) for order in orders)
    # What else it may be is refused where it is looked up.
    return cast(Key, orders)


def _function(order: str | OrderFunction) -> tuple[str, OrderFunction]:
    """Name and function of a single order."""
    if callable(order):
        return getattr(order, '__name__', repr(order)), order
    if not isinstance(order, str):
        raise TypeError(
            f'a scan order is a name, a function of height and width, or a list of '
            f'these, not {type(order).__name__}'
        )
    if order not in _functions:
        raise ValueError(
            f"there is no scan order '{order}'; there are {list_scan_orders()}"
        )
    return order, _functions[order]


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Tensors made here are kept: they must be neither fake nor for inference only."""
    with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
        yield


@lru_cache(maxsize=256)
def table_of(key: Key, height: int, width: int) -> Tensor:
    """As :func:`scan_order`, the same tensor each time."""
    if height < 1 or width < 1:
        raise ValueError(f'a map of {height} x {width} has no places to scan')
    orders = key if isinstance(key, tuple) else (key,)
    if not orders:
        raise ValueError('a scan order of no rows: the list of orders is empty')
    with real_tensors(), torch.device('cpu'):
        tables = [
            _checked(name, function(height, width), height, width)
            for name, function in map(_function, orders)
        ]
        longest = max(table.shape[1] for table in tables)
        padded = [
            torch.nn.functional.pad(table, (0, longest - table.shape[1]), value=-1)
            for table in tables
        ]
        return torch.cat(padded)


def _checked(
    name: str, rows: Tensor | Sequence[Sequence[int]], height: int, width: int
) -> Tensor:
    """What a function returned, as an int64 tensor.

    Raises:
        ValueError: It is no table of a scan order.
    """
    places = height * width
    where = f"scan order '{name}' on a map of {height} x {width}"
    try:
        table = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f'{where}: expected a table (K, L) of integers, as a tensor or as lists '
            f'of one length ({error})'
        ) from error
    integers = not (table.is_floating_point() or table.is_complex())
    integers &= table.dtype != torch.bool
    if table.ndim != 2 or not integers or not len(table) or table.shape[1] < places:
        raise ValueError(
            f'{where}: expected a table (K, L) of integers with L >= {places}, got '
            f'{table.dtype} {tuple(table.shape)}'
        )
    table = table.long().contiguous()
    padded = table.shape[1] - places
    wanted = torch.cat((table.new_full((padded,), -1), torch.arange(places)))
    wrong = (table.sort(dim=1).values != wanted).any(1)
    if wrong.any():
        k = int(wrong.nonzero()[0])
        row = table[k]
        odd = row[(row < -1) | (row >= places)].unique().tolist()
        counts = row[(row >= 0) & (row < places)].bincount(minlength=places)
        missing = (counts == 0).nonzero().flatten().tolist()
        repeated = (counts > 1).nonzero().flatten().tolist()
        faults = (('missing', missing), ('repeated', repeated), ('no place', odd))
        found = '; '.join(f'{what}: {_first(x)}' for what, x in faults if x)
        raise ValueError(
            f'{where}: every row must have each place from 0 to {places - 1} once, '
            f'and -1 elsewhere; in row {k} {found}'
        )
    return table


def _first(numbers: list[int]) -> str:
    return ', '.join(map(str, numbers[:5])) + (' ...' if len(numbers) > 5 else '')


# torch.compile asks once for each size and does not trace what this does.
@assume_constant_result
def routes_of(key: Key, height: int, width: int) -> tuple[int, ...]:
    """Of each row which of VMamba's four routes it is, ``NO_ROUTE`` if it is none."""
    return _kept_routes(key, height, width)


@lru_cache(maxsize=256)
def _kept_routes(key: Key, height: int, width: int) -> tuple[int, ...]:
    places = height * width
    with real_tensors(), torch.device('cpu'):
        routes = table_of(DEFAULT, height, width)
        # If it starts with all places, what follows is padding, without effect.
        starts = table_of(key, height, width)[:, :places]
        same = (starts[:, None] == routes).all(2).tolist()
    return tuple(row.index(True) if any(row) else NO_ROUTE for row in same)
