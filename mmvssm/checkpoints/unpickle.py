"""Read files of ``torch.save`` without running code that they contain."""

import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from mmvssm.checkpoints.archive import check_archive
from mmvssm.checkpoints.survey import survey
from mmvssm.compat import allow_mmengine_checkpoints
from mmvssm.errors import UnsafeCheckpointError

_UNKNOWN_CLASS = re.compile(r'GLOBAL (\S+) was not an allowed global')
_BLOCKED = re.compile(r'GLOBAL (\S+) whose module')
# torch fills these key by key from the file, and needs a plain dict for that.
_MAPPING_CLASSES = (
    'yacs.config.CfgNode',
    'addict.addict.Dict',
    'mmengine.config.config.ConfigDict',
    'collections.defaultdict',
)
# A pickle calls these to create an object of another class.
_HARMLESS_TO_CALL = (
    *('datetime.date', 'datetime.datetime', 'datetime.timedelta'),
    *('pathlib.PosixPath', 'pathlib.PurePosixPath', 'pathlib._local.PosixPath'),
    *('pathlib.WindowsPath', 'pathlib.PureWindowsPath', 'pathlib._local.WindowsPath'),
)
# Each foreign class means that the file is read once more.
_MOST_CLASSES = 50

_trusted: set[str] = set()


def trust(path: str | Path) -> None:
    """Allow files to be unpickled in full, with all code that they contain.

    Unpickling calls the functions that a file names. So the author of the file can do
    everything on your machine that you can. Use this only for files of your own that
    are refused otherwise. It holds until the process ends.

    Args:
        path: A file, a folder with files, or the http(s) address of a file.
    """
    _trusted.add(_absolute(path))


def is_trusted(path: str | Path) -> bool:
    """Whether :func:`trust` was called for this file or for a folder that has it."""
    path = _absolute(path)
    if '://' in path:
        return path in _trusted
    return any(str(p) in _trusted for p in (Path(path), *Path(path).parents))


def _absolute(path: str | Path) -> str:
    if '://' in str(path):
        return str(path)
    return str(Path(path).expanduser().absolute())


def unpickle(path: Path, map_location: Any = 'cpu', trusted: bool = False) -> Any:
    """``torch.load`` of a checked file, without classes other than torch's own.

    Published files have an ``argparse.Namespace``, a yacs ``CfgNode`` or numpy scalars
    besides the weights. Objects that are made from their attributes only are replaced
    by empty objects. A file that would call a function is refused.

    Args:
        path: A file of ``torch.save``, in its present or its older format.
        map_location: As in ``torch.load``.
        trusted: Unpickle everything, without these checks.

    Raises:
        UnsafeCheckpointError: Reading the file would call a function.
        CheckpointError: The file is damaged (a check sum of its archive is wrong), or
            an archive of another kind.
        Exception: Any error of torch for a file that it cannot read, or ValueError for
            an archive with damaged headers.
    """
    survey(path, check_archive(path), trusted)
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
            # torch names builtins without a module.
            if '.' not in match[1] or match[1] in stand_ins:
                raise UnsafeCheckpointError(str(path), _calls(match[1])) from error
            stand_ins[match[1]] = _stand_in(match[1], path)
    raise UnsafeCheckpointError(str(path), f'more than {_MOST_CLASSES} foreign classes')


def _calls(name: str) -> str:
    return f'reading it would call {name}, which can be any code'


def _stand_in(name: str, path: Path) -> type:
    """A class that replaces a foreign one and does nothing.

    For an object that is made from its attributes, the unpickler calls ``__new__``
    only. ``__init__`` runs only if the pickle calls the class.
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
