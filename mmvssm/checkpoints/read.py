"""Read the tensors of a checkpoint without running anything it contains."""

import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, is_main_process

from mmvssm.compat import allow_mmengine_checkpoints

# Where training codes put the weights, in order of preference.
_WRAPPERS = (
    'state_dict',
    'model',
    'model_ema',
    'state_dict_ema',
    'ema_state_dict',
    'module',
    'net',
)
_UNKNOWN_CLASS = re.compile(r'GLOBAL (\S+) was not an allowed global')
# torch fills these from the file key by key, and insists on a plain dict.
_MAPPING_CLASSES = (
    'yacs.config.CfgNode',
    'addict.addict.Dict',
    'mmengine.config.config.ConfigDict',
)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not fit the model."""


class MissingCheckpointError(CheckpointError, FileNotFoundError):
    """There is no file where a checkpoint was looked for."""


class _StandIn:
    """Takes the place of a foreign object of a file and does nothing."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _MappingStandIn(_StandIn):
    def __new__(cls, *args: Any) -> OrderedDict:
        return OrderedDict()


def read_state_dict(source: str | Path | Mapping) -> dict[str, torch.Tensor]:
    """Read a flat ``{name: tensor}`` dict.

    Args:
        source: A ``.pth`` (any file of ``torch.save``) or ``.safetensors``
            file, an http(s) address of one, or a mapping that holds tensors,
            possibly under a key such as ``state_dict`` or ``model``.

    Raises:
        MissingCheckpointError: There is no such file.
        CheckpointError: The file is truncated, or holds no state dict.
    """
    if isinstance(source, Mapping):
        return _unwrap(source, 'the given mapping')
    source = str(source)
    if source.startswith(('http://', 'https://')):
        source = _download(source)
    path = Path(source).expanduser()
    if not path.exists():
        raise MissingCheckpointError(
            f'no checkpoint at {path.absolute()}; give a .pth or .safetensors '
            'file, or an http(s) address'
        )
    try:
        content = (
            _read_safetensors(path)
            if path.suffix == '.safetensors'
            else _read_pickle(path)
        )
    except Exception as error:
        # torch has no common class for its errors of reading.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f'{path} ({_size(path)} bytes) is truncated or not a checkpoint '
            f'that can be read safely, download it again or save its state '
            f'dict alone: {reason[0]}'
        ) from error
    return _unwrap(content, str(path))


def _read_safetensors(path: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(path)


def _read_pickle(path: Path) -> Any:
    """``torch.load`` without unpickling any class but torch's own.

    Published files carry an ``argparse.Namespace``, a yacs ``CfgNode`` or
    numpy scalars beside the weights. An inert stand-in is read for each.
    """
    allow_mmengine_checkpoints()
    stand_ins = {}
    while True:
        try:
            with torch.serialization.safe_globals(list(stand_ins.values())):
                return torch.load(path, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError as error:
            match = _UNKNOWN_CLASS.search(str(error))
            if match is None or match[1] in stand_ins:
                raise
            stand_ins[match[1]] = _stand_in(match[1])


def _stand_in(name: str) -> type:
    base = _MappingStandIn if name in _MAPPING_CLASSES else _StandIn
    module, _, qualname = name.rpartition('.')
    return type(qualname, (base,), {'__module__': module})


def _unwrap(content: Any, where: str) -> dict[str, torch.Tensor]:
    while isinstance(content, Mapping):
        tensors = {
            str(key): value
            for key, value in content.items()
            if isinstance(value, torch.Tensor)
        }
        inner = next(
            (
                content[key]
                for key in _WRAPPERS
                if isinstance(content.get(key), Mapping)
            ),
            None,
        )
        if inner is None:
            if tensors:
                return tensors
            break
        content = inner
    found = (
        sorted(map(str, content))[:8]
        if isinstance(content, Mapping)
        else type(content).__name__
    )
    raise CheckpointError(
        f'{where} holds no state dict: expected tensors by name, at the top '
        f'or under one of {_WRAPPERS}, found {found}'
    )


def _download(url: str) -> str:
    """Fetch a file once per machine, into the cache of torch.hub."""
    path = Path(torch.hub.get_dir(), 'checkpoints', Path(urlparse(url).path).name)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The main process first: the others of its machine then find the file.
    for my_turn in (is_main_process(), True):
        if my_turn and not path.exists():
            try:
                torch.hub.download_url_to_file(url, str(path))
            except OSError as error:
                raise CheckpointError(f'cannot download {url}: {error}') from error
        barrier()
    return str(path)


def _size(path: Path) -> int:
    return path.stat().st_size
