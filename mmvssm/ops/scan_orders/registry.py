"""Scan orders by name, and their tables.

A scan order says in which order a scan visits the places of a map. It is data: a table
with K rows, one for each scan over the map. Each row has L numbers of places, which are
counted from 0, row by row of the map; -1 is a padded place.
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
# Orders as one hashable value.
Key: TypeAlias = str | OrderFunction | tuple[Any, ...]

DEFAULT = 'cross'
# VMamba's routes. Kernels compute their positions and need no table.
NUM_ROUTES = 4
# For a row that is none of them.
NO_ROUTE = -1
_functions: dict[str, OrderFunction] = {}


def register_scan_order(name: str) -> Callable[[OrderFunction], OrderFunction]:
    """Register a scan order under a name, for ``orders=`` of all ops and models.

    Use it as a decorator of a function of the height and width of a map. The function
    returns K rows of L >= height * width numbers, as an integer tensor (K, L) or nested
    lists. Each row has every place of the map, 0 to height * width - 1, exactly once,
    and -1 everywhere else (a padded place, see ``docs/scan_orders.md``). The rows are
    checked when a map of that size first needs them, and kept.

    Args:
        name: A name that :func:`list_scan_orders` does not have yet.

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
            :func:`register_scan_order` takes it, or a list of these. The table of a
            list has the rows of all its orders, one order after the other; shorter
            rows are padded with -1 at the end.
        height, width: Size of the map, at least 1.

    Returns:
        int64 (K, L), on the CPU: numbers of places, counted from 0 row by row of the
        map; -1 for a padded place.

    Raises:
        ValueError: There is no scan order of that name, or a function returns rows
            that do not have every place once.
        TypeError: ``orders`` is none of these.
    """
    return table_of(key_of(orders), int(height), int(width)).clone()


def count_orders(orders: Orders, height: int, width: int) -> int:
    """K, the number of scans."""
    if is_cross(orders):
        return NUM_ROUTES
    # torch.compile has symbols for sizes; index() makes numbers of them.
    return len(routes_of(key_of(orders), index(height), index(width)))


def is_cross(orders: Orders) -> bool:
    """Whether these are the four published scan orders."""
    return isinstance(orders, str) and orders == DEFAULT


def key_of(orders: Orders) -> Key:
    """The orders as one hashable value."""
    if isinstance(orders, (list, tuple)):
        return tuple(key_of(order) for order in orders)
    # A value of another type is refused later, when its table is made.
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
    """For tensors that are kept: they must be neither fake nor inference tensors."""
    with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
        yield


@lru_cache(maxsize=256)
def table_of(key: Key, height: int, width: int) -> Tensor:
    """Like :func:`scan_order`, but returns the same tensor each time."""
    if height < 1 or width < 1:
        raise ValueError(f'a map of {height} x {width} has no places to scan')
    orders = key if isinstance(key, tuple) else (key,)
    if not orders:
        raise ValueError('the list of scan orders is empty; give at least one')
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
    """Check the rows that a function returned, and make an int64 tensor of them.

    Raises:
        ValueError: They are not a table of a scan order.
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


# torch.compile calls this once for each size and does not trace it.
@assume_constant_result
def routes_of(key: Key, height: int, width: int) -> tuple[int, ...]:
    """For each row the number of the route that it is, or ``NO_ROUTE``."""
    return _kept_routes(key, height, width)


@lru_cache(maxsize=256)
def _kept_routes(key: Key, height: int, width: int) -> tuple[int, ...]:
    places = height * width
    with real_tensors(), torch.device('cpu'):
        routes = table_of(DEFAULT, height, width)
        # If all places come first, the rest is padding, which has no effect.
        starts = table_of(key, height, width)[:, :places]
        same = (starts[:, None] == routes).all(2).tolist()
    return tuple(row.index(True) if any(row) else NO_ROUTE for row in same)
