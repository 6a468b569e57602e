"""Vim checkpoints: formats, names, position embeddings and class tokens."""

import re
from collections.abc import Iterable, Mapping

import torch

from mmvssm.backbones.vim import ARCH_ZOO, Vim
from mmvssm.checkpoints import plain
from mmvssm.checkpoints.plain import component, rename, reshape
from mmvssm.layers import insert_tokens, split_tokens, token_positions

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
    r'(patch_embed|layers|norm_f|rope)\.|pos_embed$|cls_token(_head|_tail)?$'
)
_PLACEMENTS = {0: 'head', 2: 'ends'}


def file_format(keys: Iterable[str]) -> str:
    """``'vim'``, or ``'vim-fpn'`` with the pyramid inside the backbone."""
    return 'vim-fpn' if plain.has_pyramid(keys) else 'vim'


def describe(state: Mapping[str, torch.Tensor]) -> str:
    """Name of the arch that current keys and their shapes belong to."""
    return plain.describe(state, ARCH_ZOO, 'vim', 'Vim')


def fit(
    state: Mapping[str, torch.Tensor], backbone: Vim
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Fit the position embedding of a file to the model's tokens and grid.

    The vectors of class tokens are told from those of patches by where the
    tokens stand in the sequence. One that the model has no token for is left
    out; one that the file has none for stays as initialised.

    Args:
        state: Backbone of the file, converted.
        backbone: The model.

    Returns:
        The tensors for the model, and notes on what was changed.

    Raises:
        CheckpointError: The file is deeper than the model's arch, or has a
            grid that cannot be told.
    """
    plain.check_depth(state, backbone)
    state = dict(state)
    if not plain.can_fit(state, backbone):
        return state, []
    tokens = sum(key.startswith('cls_token') for key in state)
    patches = state['pos_embed'].shape[1] - tokens
    positions = token_positions(patches, tokens, _placement(tokens, backbone))
    grid, others = split_tokens(state['pos_embed'], positions)
    grid, notes = plain.fit_grid(grid, backbone)

    wanted = backbone.token_positions(grid.shape[1])
    if len(wanted) != tokens:
        own = backbone.token_positions(backbone.grid[0] * backbone.grid[1])
        others = split_tokens(backbone.pos_embed.detach(), own)[1].to(grid)
        if tokens:
            notes.append(
                f'pos_embed was taken without the vectors of class tokens at '
                f'{", ".join(map(str, positions))}'
            )
    state['pos_embed'] = insert_tokens(grid, others, wanted)
    return state, notes


def _placement(tokens: int, backbone: Vim) -> str:
    """Where the class tokens of a file stand; the model knows, the file does not."""
    if tokens in _PLACEMENTS:
        return _PLACEMENTS[tokens]
    if backbone.cls_token_place in ('head', 'middle'):
        return backbone.cls_token_place
    return backbone.pretrained_cls_token
