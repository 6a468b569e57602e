"""What to set in a config, so that its model has no map or norm that fails."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .probe import MadeUpMaps, Shape

_GROUPS = (32, 16, 8, 4, 2)


def without_unused_maps(
    model: nn.Module, config: ConfigDict, indices: Sequence[int], used: Sequence[int]
) -> dict[str, Any]:
    """What to change where a backbone is to make only the maps in use.

    Args:
        model: As built.
        config: Of the model.
        indices: The backbone's ``out_indices``.
        used: Places in them of the maps in use.

    Returns:
        Values by their names in the config, without ``model.``.
    """
    changes: dict[str, Any] = {'backbone.out_indices': tuple(indices[i] for i in used)}
    necks = config.get('neck')
    if necks:
        in_list = isinstance(necks, (list, tuple))
        name, neck = ('neck.0', necks[0]) if in_list else ('neck', necks)
        channels = neck.get('in_channels')
        if isinstance(channels, (list, tuple)) and len(channels) == len(indices):
            changes[f'{name}.in_channels'] = [channels[i] for i in used]
        # It uses all that are left.
        for key, all_maps in (('start_level', 0), ('end_level', -1)):
            if neck.get(key, all_maps) != all_maps:
                changes[f'{name}.{key}'] = all_maps
        return changes
    for name, head in _heads(model):
        index = getattr(head, 'in_index', None)
        several = isinstance(index, (list, tuple))
        places = list(index) if several else [index]
        if all(isinstance(i, int) and i % len(indices) in used for i in places):
            new = [_moved(i, len(indices), used) for i in places]
            if new != places:
                changes[f'{name}.in_index'] = new if several else new[0]
    return changes


def _heads(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name in ('decode_head', 'auxiliary_head'):
        head = getattr(model, name, None)
        if isinstance(head, nn.ModuleList):
            yield from ((f'{name}.{i}', part) for i, part in enumerate(head))
        elif head is not None:
            yield name, head


def _moved(index: int, count: int, used: Sequence[int]) -> int:
    """Where the map of an index is among those in use."""
    place = used.index(index % count)
    is_same = index < 0 and place - len(used) == index
    return index if is_same else place


def with_changes(
    config: ConfigDict, changes: dict[str, Any], shapes: Sequence[Shape]
) -> nn.Module:
    """Build a model with changes, and maps of some shapes in place of a backbone."""
    config = copy.deepcopy(config)
    for name, value in changes.items():
        *parents, key = name.split('.')
        node: Any = config
        for part in parents:
            node = node[int(part)] if isinstance(node, (list, tuple)) else node[part]
        node[key] = value
    config['backbone'] = dict(type=MadeUpMaps, shapes=shapes)
    return MODELS.build(config)


def norm_setting(model: nn.Module, config: ConfigDict, norm: str) -> tuple[str, int]:
    """Which ``norm_cfg`` a norm goes by, and a group norm that could take its place.

    Args:
        model: As built.
        config: Of the model.
        norm: Name of the norm in the model.

    Returns:
        The name in the config, without ``model.``, or '' if none is known; and a number
        of groups that fits all norms that go by it, with several channels a group.
    """
    found, module, node, place = '', model, config, ''
    for part in norm.split('.'):
        module = getattr(module, part)
        if isinstance(node, (list, tuple)):
            node = node[int(part)] if part.isdigit() else None
        else:
            node = node.get(part)
        if not isinstance(node, (dict, list, tuple)):
            break
        place = f'{place}.{part}'.lstrip('.')
        if isinstance(node, dict) and hasattr(module, 'norm_cfg'):
            found, owner = place, module
    if not found:
        return '', 0
    sizes = [
        part.num_features if isinstance(part, _BatchNorm) else part.num_channels
        for part in owner.modules()
        if isinstance(part, (_BatchNorm, nn.GroupNorm))
    ]
    fits = (
        groups
        for groups in _GROUPS
        if all(size % groups == 0 and size > groups for size in sizes)
    )
    return f'{found}.norm_cfg', next(fits, 1)
