"""What a resumed training takes from its checkpoint, whatever its config says."""

from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.runner import Runner

from mmvssm.engine.errors import UsageError

# State of a scheduler that no config sets.
_PROGRESS = ('last_step', 'base_values', 'verbose')


def check_groups(runner: Runner, checkpoint: Mapping[str, Any]) -> None:
    """Check that the optimizer's state fits the groups that the config makes.

    Args:
        runner: Whose optimizer is as the config has it.
        checkpoint: What it resumes from.

    Raises:
        UsageError: It has another number of groups, or of parameters in one.
    """
    groups, saved = _groups(runner.optim_wrapper, checkpoint.get('optimizer'))
    sizes, before = ([len(g['params']) for g in part] for part in (groups, saved))
    if saved and sizes != before:
        raise UsageError(
            f'the optimizer of the checkpoint to resume from has {len(before)} groups '
            f'of {sum(before)} parameters, and that of the config {len(sizes)} of '
            f'{sum(sizes)}: the optim_wrapper was another one (constructor, '
            'paramwise_cfg). Give the config it was trained with, or start from its '
            'weights: --cfg-options load_from=PATH, without --resume.'
        )


def kept_settings(runner: Runner, checkpoint: Mapping[str, Any]) -> list[str]:
    """Settings that the config changes and a resumed training does not.

    mmengine loads the optimizer and the schedulers of learning rates as they were
    saved, with their settings.

    Args:
        runner: Whose optimizer and schedulers are as the config has them.
        checkpoint: What it resumes from.

    Returns:
        For each ``NAME A, not B``: A is the checkpoint's value and B the config's.
    """
    found = [
        *_of_groups(runner.optim_wrapper, checkpoint.get('optimizer')),
        *_of_schedulers(runner.param_schedulers, checkpoint.get('param_schedulers')),
    ]
    return list(dict.fromkeys(found))


def _groups(wrapper: Any, saved: Any) -> tuple[list, list]:
    """Groups of an optimizer and of its saved state; none of several optimizers."""
    # The wrapper's own list has one more, which is not saved with them.
    groups = getattr(getattr(wrapper, 'optimizer', None), 'param_groups', None)
    if not isinstance(groups, list) or not isinstance(saved, Mapping):
        return [], []
    return groups, saved.get('param_groups', [])


def _of_groups(wrapper: Any, saved: Any) -> Iterator[str]:
    for now, before in zip(*_groups(wrapper, saved)):
        yield from _differences('', _settings(now), _settings(before))


def _settings(group: Mapping) -> dict[str, Any]:
    """What a config sets of a group: a rate before any scheduler has changed it."""
    return {
        key: group.get(f'initial_{key}', value)
        for key, value in group.items()
        if key != 'params' and not key.startswith('initial_')
    }


def _of_schedulers(schedulers: Any, saved: Any) -> Iterator[str]:
    if isinstance(schedulers, list) and isinstance(saved, list):
        if len(schedulers) != len(saved):
            yield f'{len(saved)} param_schedulers, not {len(schedulers)}'
        for index, (now, before) in enumerate(zip(schedulers, saved)):
            settings = {k: v for k, v in now.state_dict().items() if k[0] != '_'}
            for key in _PROGRESS:
                settings.pop(key, None)
            yield from _differences(f'param_scheduler[{index}].', settings, before)


def _differences(prefix: str, now: Mapping, before: Mapping) -> Iterator[str]:
    for key, value in now.items():
        # What was saved may have become a list.
        if key in before and _plain(value) != _plain(before[key]):
            yield f'{prefix}{key} {before[key]}, not {value}'


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
