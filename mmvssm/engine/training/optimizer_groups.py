"""Few groups of parameters instead of one for each."""

from collections.abc import Iterable, Mapping
from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from mmvssm.registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GroupedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, with all parameters of equal settings in one group.

    With a ``paramwise_cfg`` mmengine makes a group of each parameter. An optimizer of
    torch goes through its groups one by one, so that each parameter costs calls and, on
    a GPU, launches of its own. Here the updates are the same, bit by bit, of many
    parameters at a time.

    Args:
        optim_wrapper_cfg, paramwise_cfg: As of mmengine's
            ``DefaultOptimWrapperConstructor``.

    Raises:
        ValueError: Two modules share a parameter, and ``paramwise_cfg`` does not set
            ``bypass_duplicate``.

    Example:
        >>> optim_wrapper = dict(
        ...     constructor='mmvssm.GroupedOptimWrapperConstructor',
        ...     optimizer=dict(type='AdamW', lr=6e-5, weight_decay=0.01),
        ...     paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.0)}))
    """

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: int | float | None = None,
    ) -> None:
        """Add the groups of a model; mmengine calls this for its parts, too."""
        super().add_params(params, module, prefix, is_dcn_module)
        if not prefix:
            params[:] = merge_groups(params)


def merge_groups(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups of an optimizer, those with equal settings as one.

    Raises:
        ValueError: A parameter is there twice.
    """
    merged: list[tuple[dict, list]] = []
    seen = set()
    for group in groups:
        settings = {key: value for key, value in group.items() if key != 'params'}
        own = next((params for other, params in merged if other == settings), None)
        if own is None:
            own = []
            merged.append((settings, own))
        for parameter in group['params']:
            if parameter in seen:
                # Torch would only warn, and update it twice.
                raise ValueError(
                    'two modules share a parameter; set '
                    'paramwise_cfg.bypass_duplicate=True to count it once'
                )
            seen.add(parameter)
            own.append(parameter)
    return [dict(params=params, **settings) for settings, params in merged]
