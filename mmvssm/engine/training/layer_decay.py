"""Learning rates that decrease from the head to the stem of a backbone."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from mmvssm.families import layer_depths, recognise
from mmvssm.registry import OPTIM_WRAPPER_CONSTRUCTORS

_TOKENS = re.compile(r'((absolute_)?pos_embed(_cls)?|cls_token(_\w+)?)$')
# Decay rates, skips and biases of the scan, some of which have two axes.
_SCAN = re.compile(r'(A_log|A_b_log|A_logs|D|D_b|Ds|dt_projs_bias)$')
_PUBLISHED_STEM = ('backbone.cls_token', 'backbone.mask_token', 'backbone.pos_embed')
_OPTIONS = {'layer_decay_rate', 'published_vim_grouping'}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Scale the learning rate of a parameter by how deep it is in the backbone.

    Of a backbone with n blocks, block i (from 0) learns at
    ``lr * rate ** (n - i)``; the stem, with position embeddings, class tokens
    and registers, at ``lr * rate ** (n + 1)``; the output norms, the neck and
    the heads at ``lr``. A downsampling layer counts as part of the block that
    follows it. Norms, biases, tokens, position embeddings and the ``A``, ``D``
    and step sizes of the scans have no weight decay.

    The backbone may be of any family of this package.

    Args:
        optim_wrapper_cfg: The optimizer wrapper with its ``optimizer``, which
            must have an ``lr``.
        paramwise_cfg: A dict with

            - ``layer_decay_rate`` (float): In (0, 1].
            - ``published_vim_grouping`` (bool): Group as the published recipe
              for segmentation with Vim does in effect. It looks for blocks by
              a name that they do not have, so all of them learn at ``lr``, and
              only the stem at ``lr * rate ** (n + 1)``; of parameters with two
              axes or more none is spared weight decay. By default False.

    Raises:
        ValueError: An option is unknown, missing or out of range.

    Example:
        >>> optim_wrapper = dict(
        ...     constructor='mmvssm.LayerDecayOptimWrapperConstructor',
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        ...     paramwise_cfg=dict(layer_decay_rate=0.92))
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        unknown = sorted(set(self.paramwise_cfg) - _OPTIONS)
        if unknown:
            raise ValueError(
                f'paramwise_cfg of layer decay: unknown options {unknown}; known are '
                f'{sorted(_OPTIONS)}'
            )
        rate = self.paramwise_cfg.get('layer_decay_rate')
        if rate is None or not 0 < rate <= 1:
            raise ValueError(
                f'paramwise_cfg of layer decay needs a layer_decay_rate in (0, 1], '
                f'got {rate}'
            )
        if self.base_lr is None:
            raise ValueError('layer decay needs the lr of the optimizer')

    def add_params(self, params: list[dict], module: nn.Module, **kwargs: Any) -> None:
        """Add one group for every depth, with and without weight decay."""
        rate = self.paramwise_cfg['layer_decay_rate']
        published = self.paramwise_cfg.get('published_vim_grouping', False)
        parameters = dict(module.named_parameters())
        depths, last = find_depths(parameters, f'the model {type(module).__name__}')
        groups = {}
        for name, parameter in parameters.items():
            if not parameter.requires_grad:
                continue
            if published:
                depth = _published_depth(name, last)
                decays = parameter.ndim > 1 and not name.endswith('.bias')
            else:
                depth, decays = depths[name], takes_decay(name, parameter)
            key = (depth, decays)
            if key not in groups:
                groups[key] = dict(
                    params=[],
                    param_names=[],
                    lr=self.base_lr * rate ** (last - depth),
                    lr_scale=rate ** (last - depth),
                    group_name=f'depth {depth}, {"" if decays else "no "}decay',
                )
                if self.base_wd is not None:
                    groups[key]['weight_decay'] = self.base_wd if decays else 0.0
            groups[key]['params'].append(parameter)
            groups[key]['param_names'].append(name)
        params.extend(groups[key] for key in sorted(groups))
        print_log(f'Layer decay:\n{format_groups(params)}', logger='current')


def find_depths(names: Iterable[str], what: str) -> tuple[dict[str, int], int]:
    """How deep every parameter is.

    Args:
        names: Names of the parameters of a backbone or of a model that has one.
        what: How to call their owner in an error message.

    Returns:
        Depth by name: 0 for the stem, 1 + i for block i, n + 1 for what comes
        behind the n blocks; and n + 1.

    Raises:
        CheckpointError: There is no backbone of this package, or several.
    """
    names = list(names)
    found = recognise(names, what)
    own = {
        name.removeprefix(found.prefix): name
        for name in names
        if name.startswith(found.prefix)
    }
    depths, last = layer_depths(found.family, own)
    inside = {own[short]: depth for short, depth in depths.items()}
    return {name: inside.get(name, last) for name in names}, last


def takes_decay(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay makes sense for a parameter of this name."""
    if parameter.ndim <= 1 or name.endswith('.bias'):
        return False
    leaf = name.rpartition('.')[2]
    return not _SCAN.match(leaf) and not _TOKENS.match(leaf)


def _published_depth(name: str, last: int) -> int:
    stem = name in _PUBLISHED_STEM or name.startswith('backbone.patch_embed')
    return 0 if stem else last


def format_groups(groups: Sequence[Mapping[str, Any]]) -> str:
    """Table of optimizer groups: name, rate, decay, how many parameters."""
    lines = [f'{"group":<20}{"lr scale":>10}{"decay":>8}{"tensors":>9}{"weights":>11}']
    for group in groups:
        weights = sum(parameter.numel() for parameter in group['params'])
        decay = group.get('weight_decay')
        lines.append(
            f'{group["group_name"]:<20}{group["lr_scale"]:>10.5f}'
            f'{"default" if decay is None else f"{decay:g}":>8}'
            f'{len(group["params"]):>9}{weights:>11}'
        )
    return '\n'.join(lines)
