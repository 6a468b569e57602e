"""Tile sizes that were measured to be the best on a GPU, kept in a file.

An op never measures. ``python -m mmvssm.ops.triton.tune`` does, once for a
machine, and writes what it finds; ops look it up by the name of the GPU, its
compute capability, the version of Triton, the function that chooses the tile
and what it is asked. Where nothing is found the tile is that function's own.

Other tiles add up in another order, so a result's last bits depend on the file.
With the same file, or none, the same inputs give the same bits.

The file is ``triton_tiles.json`` in ``cache_folder()``, read when the first tile is
chosen.
"""

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import torch

from mmvssm.ops.cache import cache_folder
from mmvssm.ops.triton import runtime

# GPU -> function -> sizes -> ``tile`` and ``seconds``.
Table: TypeAlias = dict[str, dict[str, dict[str, dict[str, Any]]]]
T_co = TypeVar('T_co', bound=NamedTuple, covariant=True)
_trials: dict[tuple[str | int, ...], dict[str, int]] = {}


class Tunable(Protocol[T_co]):
    """A function that chooses a tile by integers; ``__wrapped__`` is not tuned."""

    @property
    def __name__(self) -> str: ...

    @property
    def __wrapped__(self) -> Callable[..., T_co]: ...

    def __call__(self, *sizes: int) -> T_co: ...


def path() -> Path:
    """Where the measured tiles are kept."""
    return cache_folder() / 'triton_tiles.json'


def device_key() -> str | None:
    """Current GPU and version of Triton, None where kernels run on no GPU."""
    if runtime.INTERPRETED or not torch.cuda.is_available():
        return None
    return _key_of(torch.cuda.current_device())


@functools.cache
def _key_of(index: int) -> str:
    import triton

    gpu = torch.cuda.get_device_properties(index)
    return f'{gpu.name}, {gpu.major}.{gpu.minor}, Triton {triton.__version__}'


def tunable(choose: Callable[..., T_co]) -> Tunable[T_co]:
    """Let a function that chooses a tile by integers prefer what was measured."""

    @functools.wraps(choose)
    def chosen(*sizes: int) -> T_co:
        default = choose(*sizes)
        name = choose.__name__
        found = _trials.get((name, *sizes)) or measured(name, sizes)
        if found is None:
            return default
        return default._replace(**{k: found[k] for k in found if k in default._fields})

    return chosen


@contextlib.contextmanager
def trying(name: str, sizes: tuple[int, ...], tile: dict[str, int]) -> Iterator[None]:
    """Make a tunable function answer these sizes with a tile, inside ``with``."""
    key: tuple[str | int, ...] = (name, *sizes)
    before = _trials.get(key)
    _trials[key] = tile
    try:
        yield
    finally:
        if before is None:
            del _trials[key]
        else:
            _trials[key] = before


def measured(name: str, sizes: tuple[int, ...]) -> dict[str, int] | None:
    """The tile measured for these sizes on the current GPU, None if there is none."""
    key = device_key()
    if key is None:
        return None
    entry = table().get(key, {}).get(name, {}).get(_joined(sizes))
    if entry is None:
        return None
    tile: dict[str, int] = entry['tile']
    return tile


@functools.cache
def table() -> Table:
    """GPU -> function -> sizes -> ``tile`` and ``seconds``; the file is read once."""
    try:
        return _read(path())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(
            f'measured tiles are ignored: {path()} cannot be read ({error}); '
            f'delete it, or write it anew: python -m mmvssm.ops.triton.tune',
            stacklevel=2,
        )
        return {}


def record(
    name: str, sizes: tuple[int, ...], tile: dict[str, int], seconds: float
) -> None:
    """Keep a tile for the current GPU, in the file and in this process.

    Raises:
        RuntimeError: Kernels run on no GPU here.
    """
    key = device_key()
    if key is None:
        raise RuntimeError('tiles are measured on a GPU, and there is none')
    # Others may have written since; what is broken is replaced.
    try:
        found = _read(path())
    except (OSError, ValueError):
        found = {}
    entry = {'tile': dict(tile), 'seconds': seconds}
    found.setdefault(key, {}).setdefault(name, {})[_joined(sizes)] = entry
    _write(path(), found)
    table.cache_clear()


def _joined(sizes: tuple[int, ...]) -> str:
    return ','.join(str(int(size)) for size in sizes)


def _read(file: Path) -> Table:
    """Read the table.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: It has something else in it.
    """
    found: Table = json.loads(file.read_text(encoding='utf-8'))
    try:
        tiles = [
            entry['tile']
            for functions in found.values()
            for entries in functions.values()
            for entry in entries.values()
        ]
        right = all(type(n) is int and n > 0 for tile in tiles for n in tile.values())
    except (AttributeError, KeyError, TypeError):
        right = False
    if not right:
        raise ValueError('it is no table of tiles')
    return found


def _write(file: Path, found: Table) -> None:
    """Write all of it or nothing: others may be reading."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f'.{os.getpid()}')
    try:
        unfinished.write_text(json.dumps(found, indent=2) + '\n', encoding='utf-8')
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
