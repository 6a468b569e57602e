"""Look through the pickle of a checkpoint before torch reads it; nothing is called.

Two things in it can make torch or numpy read memory that is not of the file: a storage
that is larger than its record (older versions of torch do not compare the two), and the
state of a numpy dtype, which numpy believes.
"""

import io
import pickle
import pickletools
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from mmvssm.checkpoints.archive import Archive

# torch's older format: a number that marks it, the version, the machine, the content.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PICKLES = 4
# Kinds of numpy's dtypes without pointers and without parts.
_PLAIN_KINDS = 'biufcSU'
# Bytes of a numpy dtype's name, such as '<U12'.
_LONGEST_DTYPE = 16
_PICKLE = b'data.pkl'


class _Nothing:
    """Stands for every class and function of a pickle, and for what they make."""

    origin = ('', '')
    args: tuple = ()

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __call__(self, *args: Any) -> '_Nothing':
        return _Nothing()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    extend = add = append


class _Dtype(_Nothing):
    """Stands for ``numpy.dtype``."""

    def __setstate__(self, state: Any) -> None:
        name = self.args[0] if self.args else None
        if not isinstance(name, str) or len(name) > _LONGEST_DTYPE:
            raise ValueError('a numpy dtype is damaged')
        dtype = np.dtype(name)
        if dtype.kind not in _PLAIN_KINDS:
            raise ValueError(f'a numpy array of {dtype} is not a plain array')
        own = dtype.__reduce__()[2]
        # The second is the byte order. Older versions of numpy write another first one.
        if (
            not isinstance(state, tuple)
            or len(state) != len(own)
            or state[0] not in (3, 4)
            or state[1] not in ('<', '>', '|', '=')
            or state[2:] != own[2:]
        ):
            raise ValueError('a numpy dtype is damaged')


class _Survey(pickle.Unpickler):
    """Reads a pickle, and compares its storages with the records of the archive."""

    def __init__(self, file: IO[bytes], archive: Archive | None, dtypes: bool):
        super().__init__(file, encoding='utf-8', errors='replace')
        self._archive, self._dtypes = archive, dtypes
        self._made: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        origin = module, name
        if origin not in self._made:
            is_dtype = self._dtypes and origin == ('numpy', 'dtype')
            base = _Dtype if is_dtype else _Nothing
            self._made[origin] = type(base.__name__, (base,), {'origin': origin})
        return self._made[origin]

    def persistent_load(self, pid: Any) -> Any:
        if self._archive is None:
            return _Nothing()
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != 'storage':
            raise ValueError('a storage of the pickle is damaged')
        _, kind, key, _, numel = pid
        if not isinstance(key, str) or type(numel) is not int:
            raise ValueError('a storage of the pickle is damaged')
        declared = numel * _itemsize(getattr(kind, 'origin', ('', ''))[1])
        size = self._archive.sizes.get(f'data/{key}'.encode(errors='replace'))
        if size != declared:
            raise ValueError(
                f'the tensor data {key[:200]!r} should have {declared} bytes, and has '
                f'{size or 0}'
            )
        return _Nothing()


def survey(path: Path, archive: Archive | None, trusted: bool) -> None:
    """Check what a checkpoint says of its storages and arrays.

    Args:
        path: A file of ``torch.save``.
        archive: Its records; None if it is no archive.
        trusted: Allow any numpy array, as for a file that is unpickled in full.

    Raises:
        ValueError: It is damaged.
        Exception: Another error of Python's unpickler for a damaged file.
    """
    if archive is not None:
        if _PICKLE not in archive.sizes:
            raise ValueError('it has no data.pkl, so it was not written by torch.save')
        _read_pickle(io.BytesIO(archive.read(_PICKLE)), archive, not trusted)
        return
    if trusted:
        return
    with path.open('rb') as file:
        if _read_pickle(file, None, False) == _LEGACY_MAGIC:
            for _ in range(_LEGACY_PICKLES - 1):
                _read_pickle(file, None, True)


def _read_pickle(file: IO[bytes], archive: Archive | None, dtypes: bool) -> Any:
    """Read one pickle; the file stays at what follows it."""
    start = file.tell()
    count, most = 0, 0
    for op, value, _ in pickletools.genops(file):
        count += 1
        if op.name in ('PUT', 'BINPUT', 'LONG_BINPUT'):
            most = max(most, value)
    # The unpickler keeps a place for each number up to the largest.
    if most > count:
        raise ValueError('the pickle is damaged')
    stop = file.tell()
    file.seek(start)
    content = _Survey(file, archive, dtypes).load()
    file.seek(stop)
    return content


def _itemsize(name: str) -> int:
    """Bytes of a number of a storage, from the name of its class."""
    if name == 'UntypedStorage':
        return 1
    try:
        return torch.serialization.StorageType(name).dtype.itemsize
    except KeyError:
        raise ValueError(f'a storage of an unknown type {name[:200]!r}') from None
