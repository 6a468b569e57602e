"""Read the tensors of a checkpoint without running code that it contains."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, is_main_process

from mmvssm.checkpoints.unpickle import is_trusted, unpickle
from mmvssm.errors import CheckpointError, MissingCheckpointError

# Keys under which training programs store the weights, in order of preference.
_WRAPPERS = (
    'state_dict',
    'model',
    'model_ema',
    'state_dict_ema',
    'ema_state_dict',
    'module',
    'net',
)
# The deepest nesting of these keys; a file may contain itself.
_DEEPEST = 8


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
        where, state = 'the given mapping', _find_tensors(source, 'the given mapping')
        _check_tensors(state, where)
        return state
    path = _local(source)
    state = _find_tensors(_read(path, 'cpu', is_trusted(source)), str(path))
    _check_tensors(state, str(path), path.stat().st_size)
    return state


def read_content(source: str | Path, map_location: Any = 'cpu') -> Any:
    """Read everything in a file, not only its weights.

    Args:
        source: A ``.pth`` or ``.safetensors`` file, or an http(s) address of one.
        map_location: As in ``torch.load``.

    Returns:
        The result of ``torch.load(weights_only=True)``, with empty objects instead of
        objects of other classes.

    Raises:
        MissingCheckpointError: There is no such file.
        UnsafeCheckpointError: Reading the file would call a function; see
            :func:`mmvssm.checkpoints.trust`.
        CheckpointError: The file is truncated or damaged.
    """
    return _read(_local(source), map_location, is_trusted(source))


def _local(source: str | Path) -> Path:
    """Path of the file; it is downloaded if ``source`` is an address."""
    source = str(source)
    if source.startswith(('http://', 'https://')):
        source = _download(source)
    return Path(source).expanduser()


def _read(path: Path, map_location: Any, trusted: bool) -> Any:
    if not path.exists():
        raise MissingCheckpointError(
            f'no checkpoint at {path.absolute()}; give a .pth or .safetensors '
            'file, or an http(s) address'
        )
    try:
        if path.suffix == '.safetensors':
            return _read_safetensors(path, map_location)
        return unpickle(path, map_location, trusted)
    except CheckpointError:
        raise
    except Exception as error:
        # torch raises errors of many classes when it cannot read a file.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f'{path} ({path.stat().st_size} bytes) is truncated or not a checkpoint '
            f'that can be read safely, download it again or save its state '
            f'dict alone: {reason[0]}'
        ) from error


def _read_safetensors(path: Path, map_location: Any) -> dict:
    from safetensors.torch import load_file

    # torch.load also takes functions and dicts of devices; mmengine never passes them.
    named = isinstance(map_location, (str, torch.device))
    return load_file(path, str(map_location) if named else 'cpu')


def _find_tensors(content: Any, where: str) -> dict[str, torch.Tensor]:
    for _ in range(_DEEPEST):
        if not isinstance(content, Mapping):
            break
        inner = [content.get(key) for key in _WRAPPERS]
        inner = [value for value in inner if isinstance(value, Mapping)]
        if inner:
            content = inner[0]
            continue
        tensors = {
            key: value
            for key, value in content.items()
            if isinstance(key, str) and isinstance(value, torch.Tensor)
        }
        if tensors:
            return tensors
        break
    found = type(content).__name__
    if isinstance(content, Mapping):
        found = sorted(key for key in content if isinstance(key, str))[:8]
    raise CheckpointError(
        f'{where} holds no state dict: expected tensors by name, at the top '
        f'or under one of {_WRAPPERS}, found {found}'
    )


def _check_tensors(
    state: Mapping[str, torch.Tensor], where: str, size: int | None = None
) -> None:
    """Refuse tensors that a model cannot take, or that are larger than the file.

    A model is loaded tensor by tensor. Without this check, a tensor that cannot be
    copied would leave the model half loaded.
    """
    for key, value in state.items():
        problem = ''
        if value.layout != torch.strided or value.is_quantized or value.is_nested:
            problem = f'a {value.layout} tensor of {value.dtype}'
        elif value.device.type == 'meta':
            problem = 'a tensor without numbers (device meta)'
        elif value.is_complex():
            problem = 'complex'
        elif size is not None and value.numel() * value.element_size() > size:
            problem = f'{tuple(value.shape)}, larger than the file'
        if problem:
            raise CheckpointError(f'{where} cannot be used: {key[:200]} is {problem}')


def _download(url: str) -> str:
    """Download a file once on each machine, into the cache of torch.hub."""
    path = Path(torch.hub.get_dir(), 'checkpoints', Path(urlparse(url).path).name)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The main process first; the others on its machine then find the file.
    for my_turn in (is_main_process(), True):
        if my_turn and not path.exists():
            try:
                torch.hub.download_url_to_file(url, str(path))
            except OSError as error:
                raise CheckpointError(f'cannot download {url}: {error}') from error
        barrier()
    return str(path)
