"""MLLA checkpoints: names and what their shapes tell."""

import re
from collections.abc import Iterable, Mapping

import torch

from mmvssm.backbones.mlla import ARCH_ZOO, MLLA
from mmvssm.checkpoints.staged import component, count_blocks

__all__ = [
    'BACKBONE_KEY',
    'component',
    'describe',
    'file_format',
    'fit',
    'rename',
    'reshape',
]

BACKBONE_KEY = re.compile(r'(patch_embed|layers|norm\d+)\.|absolute_pos_embed$')
_HEAD = re.compile(r'(norm|head)\.')
_ROTARY_TABLE = re.compile(r'layers\.\d+\.blocks\.\d+\.attn\.rope\.rotations')


def rename(key: str) -> str:
    """Published name, without prefix -> own name."""
    return f'classifier.{key}' if _HEAD.match(key) else key


def file_format(keys: Iterable[str]) -> str:
    """Always ``'mlla'``."""
    return 'mlla'


def reshape(key: str, value: torch.Tensor) -> torch.Tensor:
    """Nothing is stored in another shape."""
    return value


def fit(
    state: Mapping[str, torch.Tensor], backbone: MLLA
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Leave out the rotary tables of a file.

    They belong to the image size of its training. Models here make the same
    tables for the map at hand.
    """
    kept = {key: x for key, x in state.items() if not _ROTARY_TABLE.fullmatch(key)}
    left = len(state) - len(kept)
    note = f'{left} rotary tables were left out: the model makes its own'
    return kept, [note] if left else []


def describe(state: Mapping[str, torch.Tensor]) -> str:
    """Name of the arch that current keys and their shapes belong to."""
    try:
        dims = state['layers.0.blocks.0.norm1.weight'].numel()
        hidden = state['layers.0.blocks.0.mlp.fc1.bias'].numel()
    except KeyError:
        return 'an incomplete MLLA'
    found = dict(depths=count_blocks(state), dims=dims, mlp_ratio=hidden / dims)
    for name, arch in ARCH_ZOO.items():
        if all(arch[key] == value for key, value in found.items()):
            return f'mlla_{name}'
    return 'a MLLA with ' + ', '.join(f'{k}={v}' for k, v in found.items())
