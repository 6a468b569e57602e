"""Read files of ``torch.save`` without running anything they contain."""

import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from mmvssm.compat import allow_mmengine_checkpoints
from mmvssm.errors import CheckpointError, UnsafeCheckpointError

_UNKNOWN_CLASS = re.compile(r'GLOBAL (\S+) was not an allowed global')
_BLOCKED = re.compile(r'GLOBAL (\S+) whose module')
# torch fills these from the file key by key, and insists on a plain dict.
_MAPPING_CLASSES = (
    'yacs.config.CfgNode',
    'addict.addict.Dict',
    'mmengine.config.config.ConfigDict',
    'collections.defaultdict',
)
# A pickle calls these where it only sets up an instance of other classes.
_HARMLESS_TO_CALL = (
    *('datetime.date', 'datetime.datetime', 'datetime.timedelta'),
    *('pathlib.PosixPath', 'pathlib.PurePosixPath', 'pathlib._local.PosixPath'),
    *('pathlib.WindowsPath', 'pathlib.PureWindowsPath', 'pathlib._local.WindowsPath'),
)
# Every one means to read the file again.
_MOST_CLASSES = 50

_trusted: set[str] = set()


def trust(path: str | Path) -> None:
    """Let files be unpickled in full, whatever code they hold.

    Unpickling calls what a file names: whoever made it can do with your
    machine what you can. For files of your own alone that are refused
    otherwise.

    Args:
        path: A file, a folder with files, or the http(s) address of one. Holds
            until the process ends.
    """
    _trusted.add(_absolute(path))


def is_trusted(path: str | Path) -> bool:
    """Whether :func:`trust` was called for this file, or a folder it is in."""
    path = _absolute(path)
    if '://' in path:
        return path in _trusted
    return any(str(p) in _trusted for p in (Path(path), *Path(path).parents))


def _absolute(path: str | Path) -> str:
    if '://' in str(path):
        return str(path)
    return str(Path(path).expanduser().absolute())


def unpickle(path: Path, map_location: Any = 'cpu', trusted: bool = False) -> Any:
    """``torch.load`` with check sums, and no class but torch's own.

    Published files carry an ``argparse.Namespace``, a yacs ``CfgNode`` or
    numpy scalars beside the weights. Objects that are set up from their
    attributes alone are replaced by inert stand-ins; a file that would have
    something called is refused.

    Args:
        path: A file of ``torch.save``, of its present or its older form.
        map_location: As in ``torch.load``.
        trusted: Unpickle everything, after all.

    Raises:
        UnsafeCheckpointError: Something would be called.
        CheckpointError: The file is damaged: a check sum of its archive is wrong.
        Exception: Whatever torch makes of a file it cannot read.
    """
    _check_archive(path)
    if trusted:
        return torch.load(path, map_location=map_location, weights_only=False)
    allow_mmengine_checkpoints()
    stand_ins = {}
    while len(stand_ins) <= _MOST_CLASSES:
        try:
            with torch.serialization.safe_globals(list(stand_ins.values())):
                return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            if blocked := _BLOCKED.search(str(error)):
                raise UnsafeCheckpointError(str(path), _calls(blocked[1])) from error
            match = _UNKNOWN_CLASS.search(str(error))
            if match is None:
                raise
            # torch leaves builtins without a module.
            if '.' not in match[1] or match[1] in stand_ins:
                raise UnsafeCheckpointError(str(path), _calls(match[1])) from error
            stand_ins[match[1]] = _stand_in(match[1], path)
    raise UnsafeCheckpointError(str(path), f'more than {_MOST_CLASSES} foreign classes')


def _check_archive(path: Path) -> None:
    """Compare check sums, which torch does not, and sizes.

    Raises:
        CheckpointError: The file is damaged, or unpacks to more than it is.
    """
    with path.open('rb') as file:
        # What torch goes by; its older form has no check sums.
        if file.read(4) != b'PK\x03\x04':
            return
    with zipfile.ZipFile(path) as archive:
        content = sum(entry.file_size for entry in archive.infolist())
        # torch does not compress.
        if content > path.stat().st_size:
            raise CheckpointError(f'{path} declares {content} bytes, more than it has')
        damaged = archive.testzip()
    if damaged:
        raise CheckpointError(f'{path} is damaged: check sum of {damaged}')


def _calls(name: str) -> str:
    return f'reading it would call {name}, which can be any code'


def _stand_in(name: str, path: Path) -> type:
    """A class that takes the place of a foreign one and does nothing.

    The unpickler calls ``__new__`` for an object that is set up from its
    attributes, and the class itself where the pickle calls it: only then does
    ``__init__`` run.
    """

    def init(self: object, *args: Any) -> None:
        if name not in _HARMLESS_TO_CALL:
            raise UnsafeCheckpointError(str(path), _calls(name))

    module, _, qualname = name.rpartition('.')
    methods: dict[str, Any] = {
        '__module__': module,
        '__new__': _new_mapping if name in _MAPPING_CLASSES else _new,
        '__init__': init,
        '__setstate__': _ignore_state,
    }
    return type(qualname, (), methods)


def _new(cls: type, *args: Any) -> object:
    return object.__new__(cls)


def _new_mapping(cls: type, *args: Any) -> OrderedDict:
    return OrderedDict()


def _ignore_state(self: object, state: Any) -> None:
    pass
