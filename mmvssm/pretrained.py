"""Folders that hold a whole model: weights, config and a model card."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.model import is_model_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmvssm import zoo
from mmvssm.builders import build_backbone, build_classifier
from mmvssm.checkpoints.read import read_weights
from mmvssm.checkpoints.write import write_tensors
from mmvssm.errors import CheckpointError

WEIGHTS = 'model.safetensors'
CONFIG = 'config.json'
CARD = 'README.md'
_BUILDERS = {'classifier': build_classifier, 'backbone': build_backbone}
# Configs may come from strangers: nothing but registered names is built.
_TYPE = re.compile(r'((mmvssm|mmseg|mmdet|mmengine|mmcv|mmpretrain)\.)?\w+')


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    config: Config | None = None,
    licence: str | None = None,
) -> Path:
    """Write a model that :func:`load_pretrained` gives back bit for bit.

    Args:
        model: A classifier or backbone of :func:`mmvssm.build_classifier` or
            :func:`mmvssm.build_backbone`, or a segmentor or detector.
        folder: Where to; made if need be. It gets ``model.safetensors``,
            ``config.json`` and the model card ``README.md``.
        config: Of a segmentor or detector, unless the model has it as ``model.cfg``,
            as those of mmseg's and mmdet's ``init_model`` and inferencers do.
        licence: Of the weights, for the card. By default that of the weights of the
            zoo that were loaded into the model, if any were.

    Returns:
        The folder.

    Raises:
        ValueError: It is not known how to build the model again.
    """
    while is_model_wrapper(model):
        model = model.module
    description = _describe(model, config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(model.state_dict(), folder / WEIGHTS, dict(format='pt'))
    text = json.dumps(description, indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(f'{text}\n')
    (folder / CARD).write_text(_card(model, description, licence))
    return folder


def load_pretrained(source: str | Path) -> nn.Module:
    """Build the model of a folder and fill it, in eval mode.

    Args:
        source: What :func:`save_pretrained` wrote: a folder, or
            ``hf://OWNER/REPOSITORY[@REVISION]``.

    Returns:
        The classifier, backbone, segmentor or detector. ``dataset_meta``, with the
        names of the classes, is as it was.

    Raises:
        CheckpointError: A file is missing or damaged, or does not fit the model.
        ZooError: It cannot be downloaded.
    """
    description = _read_config(_file_of(source, CONFIG))
    weights = _file_of(source, WEIGHTS)
    model = _build(description, str(source))
    tensors = read_weights(weights).tensors
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f'{source}: the weights do not fit the model of {CONFIG}: {error}'
        ) from error
    return model.eval()


def _file_of(source: str | Path, name: str) -> Path:
    text = str(source)
    if zoo.is_address(text):
        repository, at, revision = text.partition('@')
        return zoo.fetch(f'{repository.rstrip("/")}/{name}{at}{revision}')
    path = Path(source).expanduser() / name
    if not path.is_file():
        raise CheckpointError(
            f'{source} has no {name}; give a folder that mmvssm.save_pretrained wrote'
        )
    return path


# What is built


def _describe(model: nn.Module, config: Config | None) -> dict[str, Any]:
    """What :func:`_build` needs."""
    built = getattr(model, 'built_as', None)
    if built is not None and config is None:
        return {built['kind']: _plain(built['arguments'])}
    config = config if config is not None else getattr(model, 'cfg', None)
    if config is None or 'model' not in config:
        raise ValueError(
            f'it is not known how to build this {type(model).__name__} again: build it '
            'with mmvssm.build_classifier or build_backbone, or give the config of the '
            'segmentor or detector with config='
        )
    return dict(
        model=_plain(config.model),
        scope=config.get('default_scope', 'mmseg'),
        dataset_meta=_plain(getattr(model, 'dataset_meta', None)),
    )


def _build(description: Mapping[str, Any], where: str) -> nn.Module:
    for kind, builder in _BUILDERS.items():
        if kind in description:
            return builder(**description[kind])
    cfg = description.get('model')
    if not isinstance(cfg, dict):
        raise CheckpointError(f'{where}: {CONFIG} says nothing of a model')
    refuse_unregistered(cfg, where, CONFIG)
    with DefaultScope.overwrite_default_scope(description.get('scope')):
        model = MODELS.build(ConfigDict(cfg))
    if description.get('dataset_meta'):
        model.dataset_meta = description['dataset_meta']
    return model


def refuse_unregistered(cfg: Any, where: str, part: str) -> None:
    """Refuse a part of a config from a stranger that would build any Python object.

    Args:
        cfg: Dicts and lists.
        where: The file, in messages.
        part: What of it, in messages.

    Raises:
        CheckpointError: A ``type`` is no registered name.
    """
    for found in _types(cfg):
        if not isinstance(found, str) or not _TYPE.fullmatch(found):
            raise CheckpointError(
                f'{where} is refused: {part} would build {found!r}, which is no '
                'registered name'
            )


def _types(cfg: Any) -> Iterator[Any]:
    if isinstance(cfg, dict):
        if 'type' in cfg:
            yield cfg['type']
        cfg = list(cfg.values())
    if isinstance(cfg, list):
        for part in cfg:
            yield from _types(part)


def _plain(value: Any) -> Any:
    """Dicts, lists, numbers and texts, as JSON has them.

    Raises:
        ValueError: There is something else, such as a function.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f'cannot be written to {CONFIG}: {value!r}')


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f'{path} is damaged: {error}') from error
    if not isinstance(found, dict):
        raise CheckpointError(f'{path} holds no config')
    return found


# The model card


def _card(model: nn.Module, description: Mapping[str, Any], licence: str | None) -> str:
    rows = [
        zoo.find(source)
        for source in getattr(model, 'loaded_from', ())
        if source.startswith(zoo.SCHEME)
    ]
    if licence is None:
        licence = '; '.join(f'{row.name}: {row.licence}' for row in rows)
    kind = next(kind for kind in (*_BUILDERS, 'model') if kind in description)
    name = description[kind].get('name') or description[kind].get('type', 'model')
    number = sum(parameter.numel() for parameter in model.parameters())
    started = ''.join(
        f'- Started from the published weights `{row.name}` ({row.url}).\n'
        for row in rows
    )
    return f"""---
library_name: mmvssm
tags: [mmvssm, {kind}]
---

# {name}

A {kind} of mmvssm, {number / 1e6:.2f} M parameters.

- Licence of the weights: {licence or 'not stated'}.
{started}
```python
import mmvssm

model = mmvssm.load_pretrained('PATH OR hf://OWNER/REPOSITORY OF THIS FOLDER')
```
"""
