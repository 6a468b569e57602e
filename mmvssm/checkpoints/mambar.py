"""Mamba® checkpoints: formats, names and position embeddings."""

import re
from collections.abc import Iterable, Mapping

import torch

from mmvssm.backbones.mambar import ARCH_ZOO, MambaR
from mmvssm.checkpoints import plain
from mmvssm.checkpoints.plain import rename, reshape

__all__ = [
    'BACKBONE_KEY',
    'component',
    'describe',
    'file_format',
    'fit',
    'rename',
    'reshape',
]

BACKBONE_KEY = re.compile(
    r'(patch_embed|layers|norm_f)\.|(pos_embed|pos_embed_cls|cls_token)$'
)


def file_format(keys: Iterable[str]) -> str:
    """Always ``'mambar'``."""
    return 'mambar'


def component(key: str) -> str | None:
    """As for Vim; registers, which no model does without, are of the stem."""
    if key in ('cls_token', 'pos_embed_cls'):
        return 'patch_embed.'
    return plain.component(key)


def describe(state: Mapping[str, torch.Tensor]) -> str:
    """Name of the arch that current keys and their shapes belong to."""
    return plain.describe(state, ARCH_ZOO, 'mambar', 'Mamba-R')


def fit(
    state: Mapping[str, torch.Tensor], backbone: MambaR
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Resize the position embedding of a file to the model's grid.

    See :func:`mmvssm.checkpoints.vim.fit`. Registers have no place in it.
    """
    plain.check_depth(state, backbone)
    state = dict(state)
    if not plain.can_fit(state, backbone):
        return state, []
    state['pos_embed'], notes = plain.fit_grid(state['pos_embed'], backbone)
    return state, notes
