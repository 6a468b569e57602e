"""Read the tensors of a checkpoint without running code that it contains."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mmvssm import zoo
from mmvssm.checkpoints.unpickle import is_trusted, unpickle
from mmvssm.errors import CheckpointError, MissingCheckpointError

COPIES = ('raw', 'ema')
# Keys under which training programs store the weights, in order of preference.
_RAW = ('state_dict', 'model', 'module', 'net')
_EMA = ('model_ema', 'state_dict_ema', 'ema_state_dict')
_WRAPPERS = (*_RAW[:2], *_EMA, *_RAW[2:])
# The deepest nesting of these keys; a file may contain itself.
_DEEPEST = 8
# Types of numbers that can be copied into weights, as far as this torch has them.
_NUMBERS = {
    getattr(torch, name)
    for name in (
        *('bool', 'uint8', 'uint16', 'uint32', 'uint64'),
        *('int8', 'int16', 'int32', 'int64'),
        *('float16', 'bfloat16', 'float32', 'float64'),
        *('float8_e4m3fn', 'float8_e4m3fnuz', 'float8_e5m2', 'float8_e5m2fnuz'),
        'float8_e8m0fnu',
    )
    if hasattr(torch, name)
}
# What torch writes, behind some advice, before the reason why it refuses a pickle.
_TORCHS_REASON = 'WeightsUnpickler error:'
_ADVICE = re.compile('weights.only', re.IGNORECASE)
# How to say what is read.
_GIVE = (
    'give a .pth or .safetensors file, an http(s) or hf:// address, or a name of the '
    'zoo (mmvssm://NAME, see `python -m mmvssm.zoo list`)'
)


@dataclass(frozen=True)
class Weights:
    """The weights that were taken from a file.

    Attributes:
        tensors: By name.
        copy: Under which key they were, such as ``'model'``; None if at the top.
        others: Keys of further copies of the weights in the file.
        notes: What a user should know of the choice.
        grids: Rows and columns of position embeddings, by the name of the module that
            has one, as far as the file says so.
    """

    tensors: dict[str, torch.Tensor]
    copy: str | None = None
    others: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    grids: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def read_weights(source: str | Path | Mapping, copy: str | None = None) -> Weights:
    """Read weights, and say which copy of them.

    Many files hold raw weights and averaged ones (EMA). Of a file of the zoo the copy
    is taken that its published figures belong to, of others the raw one.

    Args:
        source: A ``.pth`` (any file of ``torch.save``) or ``.safetensors``
            file, an address (http(s), ``mmvssm://NAME``,
            ``hf://OWNER/REPOSITORY/FILE``), or a mapping that holds tensors,
            possibly under a key such as ``state_dict`` or ``model``.
        copy: ``'raw'`` or ``'ema'``, None for the default.

    Raises:
        MissingCheckpointError: There is no such file.
        ZooError: It cannot be fetched.
        CheckpointError: The file is truncated, or holds no state dict, or not this
            copy.
        ValueError: ``copy`` is neither.
    """
    if copy not in (*COPIES, None):
        raise ValueError(f'weights must be one of {COPIES} or None, got {copy!r}')
    if isinstance(source, Mapping):
        where, size = 'the given mapping', None
        content: Any = source
        meta = content.get('meta')
    else:
        path = _local(source)
        where = str(path)
        content = _read(path, 'cpu', is_trusted(source))
        size = path.stat().st_size
        meta = content.get('meta') if isinstance(content, Mapping) else None
        if path.suffix == '.safetensors':
            meta = _metadata(path)
    row = zoo.find(source) if _is_zoo_name(source) else None
    found = _choose(content, where, copy, row)
    found = replace(found, grids={**_grids_of_meta(meta), **found.grids})
    _check_tensors(found.tensors, where, size)
    return found


def read_state_dict(
    source: str | Path | Mapping, copy: str | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of :func:`read_weights`, by name."""
    return read_weights(source, copy).tensors


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


def _is_zoo_name(source: object) -> bool:
    return isinstance(source, str) and source.startswith(zoo.SCHEME)


def _local(source: str | Path) -> Path:
    """Path of the file; it is downloaded if ``source`` is an address."""
    if zoo.is_address(source):
        return zoo.fetch(str(source))
    if re.match(r'[\w+-]+://', str(source)):
        raise MissingCheckpointError(
            f'no checkpoint at {source}, an address of no known kind; {_GIVE}. If '
            'these are weights of a backbone that you have replaced, set '
            'pretrained=None in the model'
        )
    path = Path(source).expanduser()
    # A folder that mmvssm.save_pretrained wrote.
    whole = path / 'model.safetensors'
    return whole if whole.is_file() else path


def _read(path: Path, map_location: Any, trusted: bool) -> Any:
    if not path.exists():
        raise MissingCheckpointError(f'no checkpoint at {path.absolute()}; {_GIVE}')
    try:
        if path.suffix == '.safetensors':
            return _read_safetensors(path, map_location)
        return unpickle(path, map_location, trusted)
    except CheckpointError:
        raise
    except Exception as error:
        # torch raises errors of many classes when it cannot read a file.
        raise CheckpointError(
            f'{path} ({path.stat().st_size} bytes) is truncated or not a checkpoint '
            f'that can be read safely, download it again or save its state '
            f'dict alone: {_reason(error)}'
        ) from error


def _reason(error: Exception) -> str:
    """One line of an error, without torch's advice to read the file in full."""
    text = str(error)
    text = text.partition(_TORCHS_REASON)[2].strip() or text.strip()
    lines = [line for line in text.splitlines() if not _ADVICE.search(line)]
    return lines[0] if lines else type(error).__name__


def _read_safetensors(path: Path, map_location: Any) -> dict:
    from safetensors.torch import load_file

    # torch.load also takes functions and dicts of devices; mmengine never passes them.
    named = isinstance(map_location, (str, torch.device))
    return load_file(path, str(map_location) if named else 'cpu')


def _metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself."""
    from safetensors import safe_open

    with safe_open(path, 'pt') as file:
        return file.metadata() or {}


def _choose(
    content: Any, where: str, copy: str | None, row: zoo.Weights | None
) -> Weights:
    copies = _copies(content)
    notes = []
    if copy is None:
        key = next(iter(copies)) if copies else None
        if row is not None and row.copy is None and len(copies) > 1:
            notes.append(
                'which copy the published figures belong to is not known; weights='
                "'ema' takes the averaged one"
            )
        elif row is not None and row.copy in copies:
            key = row.copy
        elif row is not None and row.copy is not None:
            notes.append(
                f'the published figures belong to {row.copy}, which the file does '
                'not have'
            )
    else:
        key = _of_kind(copies, copy, where)
    if key is None:
        tensors = _tensors_in(content)
        if not tensors:
            raise CheckpointError(_no_tensors(content, where))
        return Weights(tensors, grids=_grids_of_state(content))
    others = tuple(other for other in copies if other != key)
    tensors = _tensors_in(copies[key])
    return Weights(tensors, key, others, tuple(notes), _grids_of_state(copies[key]))


def _copies(content: Any) -> dict[str, Mapping]:
    """Copies of the weights by their key, the preferred one first."""
    for _ in range(_DEEPEST):
        if not isinstance(content, Mapping):
            return {}
        inner = {
            key: content[key]
            for key in _WRAPPERS
            if isinstance(content.get(key), Mapping)
        }
        found = {key: value for key, value in inner.items() if _tensors_in(value)}
        nested = next((value for key, value in inner.items() if key not in found), None)
        if found or nested is None:
            return found
        content = nested
    return {}


def _of_kind(copies: Mapping[str, object], copy: str, where: str) -> str | None:
    """Key of the raw or of the averaged weights."""
    raw, ema = _RAW, _EMA
    # mmengine's hook swaps the two, so that a plain load gets the averaged ones.
    if 'ema_state_dict' in copies and 'state_dict' in copies:
        raw, ema = ('ema_state_dict',), ('state_dict',)
    found = next(
        (key for key in (raw if copy == 'raw' else ema) if key in copies), None
    )
    if found is None and (copy == 'ema' or copies):
        kind = 'averaged (EMA)' if copy == 'ema' else 'raw'
        raise CheckpointError(
            f'{where} holds no {kind} weights, but {list(copies) or "one copy alone"}; '
            'leave weights= out to take what there is'
        )
    return found


def _tensors_in(content: Any) -> dict[str, torch.Tensor]:
    if not isinstance(content, Mapping):
        return {}
    return {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor)
    }


def _grids_of_state(state: Mapping) -> dict[str, tuple[int, int]]:
    """What the modules of a state dict noted; see ``note_grid`` of the backbones."""
    notes = getattr(state, '_metadata', None)
    if not isinstance(notes, Mapping):
        return {}
    found = {
        name: note.get('grid') for name, note in notes.items() if isinstance(note, dict)
    }
    return {name: grid for name, grid in found.items() if _is_grid(grid)}


def _grids_of_meta(meta: Any) -> dict[str, tuple[int, int]]:
    """What :func:`mmvssm.checkpoints.save_checkpoint` wrote."""
    try:
        found = json.loads(meta['grids'])
    except (TypeError, KeyError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: tuple(grid) for name, grid in found.items() if _is_grid(grid)}


def _is_grid(grid: Any) -> bool:
    return (
        isinstance(grid, (list, tuple))
        and len(grid) == 2
        and all(isinstance(side, int) and side > 0 for side in grid)
    )


def _no_tensors(content: Any, where: str) -> str:
    found = type(content).__name__
    if isinstance(content, Mapping):
        found = sorted(key for key in content if isinstance(key, str))[:8]
    return (
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
        elif value.dtype not in _NUMBERS:
            problem = f'of {value.dtype}, which torch cannot turn into float32'
        elif size is not None and value.numel() * value.element_size() > size:
            problem = f'{tuple(value.shape)}, larger than the file'
        if problem:
            raise CheckpointError(f'{where} cannot be used: {key[:200]} is {problem}')
