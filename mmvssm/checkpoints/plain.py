"""What the checkpoints of Vim and Mamba® have in common."""

import math
import re
from collections.abc import Iterable, Mapping

import torch

from mmvssm.backbones.plain import PlainMamba
from mmvssm.checkpoints.errors import CheckpointError
from mmvssm.layers import resize_position

_RENAMES = (
    (r'(head|neck|norm_neck)\.', r'classifier.\1.'),
    # Enlarging layers that the published segmentation backbone has inside.
    (r'fpn1\.', 'neck.upsample_4x.'),
    (r'fpn2\.', 'neck.upsample_2x.'),
)
_RENAMES = tuple((re.compile(old), new) for old, new in _RENAMES)
# What is renamed already, and must not be again.
_CURRENT = re.compile(r'neck\.upsample_')


def rename(key: str) -> str:
    """Published or own name, without prefix -> own name."""
    if _CURRENT.match(key):
        return key
    for old, new in _RENAMES:
        if old.match(key):
            return old.sub(new, key, count=1)
    return key


def has_pyramid(keys: Iterable[str]) -> bool:
    """Whether the backbone of the file has layers that belong to a neck."""
    return any(key.startswith(('fpn1.', 'fpn2.')) for key in keys)


def component(key: str) -> str | None:
    """Which part the name belongs to that is there as a whole or not at all.

    None for class tokens, the last norm and rotary tables, which some models of
    the family have and others do not. The position embedding is part of the
    stem: without it a file's weights are of no use.
    """
    if key == 'pos_embed':
        return 'patch_embed.'
    match = re.match(r'patch_embed\.|layers\.\d+\.', key)
    return match and match[0]


def reshape(key: str, value: torch.Tensor) -> torch.Tensor:
    """Nothing is stored in another shape."""
    return value


def describe(
    state: Mapping[str, torch.Tensor], zoo: Mapping[str, dict], name: str, family: str
) -> str:
    """Name of the arch that current keys and their shapes belong to.

    Variants with another stride have the same weights and go by the name of the
    one with stride 16.
    """
    depth = _count_blocks(state)
    try:
        embed_dims, _, _, patch_size = state['patch_embed.proj.weight'].shape
        d_state = state['layers.0.mixer.A_log'].shape[1]
    except (KeyError, IndexError, ValueError):
        return f'an incomplete {family}'
    found = dict(
        embed_dims=embed_dims, depth=depth, patch_size=patch_size, d_state=d_state
    )
    for arch_name, arch in zoo.items():
        if all(arch[key] == value for key, value in found.items()):
            return f'{name}_{arch_name}'
    return f'a {family} with ' + ', '.join(f'{k}={v}' for k, v in found.items())


def check_depth(state: Mapping[str, torch.Tensor], backbone: PlainMamba) -> None:
    """Refuse a file of a deeper arch, whose first blocks would fit.

    Raises:
        CheckpointError: It is deeper than the arch of the model.
    """
    depth = _count_blocks(state)
    if depth > backbone.depth:
        raise CheckpointError(
            f'the file does not fit the model: it has {depth} blocks, the arch of the '
            f'model {backbone.depth}'
        )


def can_fit(state: Mapping[str, torch.Tensor], backbone: PlainMamba) -> bool:
    """Whether there are position embeddings of one width in file and model."""
    if 'pos_embed' not in state or 'pos_embed' not in backbone.token_names:
        return False
    return state['pos_embed'].shape[2:] == backbone.pos_embed.shape[2:]


def fit_grid(
    patches: torch.Tensor, backbone: PlainMamba
) -> tuple[torch.Tensor, list[str]]:
    """Resize the position embedding of patches (1, M, C) to the model's grid.

    A grid that has not the model's number of patches is taken to be square.

    Returns:
        The embedding, and a note if it was resized.

    Raises:
        CheckpointError: The number of patches is no square.
    """
    length, new = patches.shape[1], backbone.grid
    if length == new[0] * new[1]:
        return patches, []
    side = math.isqrt(length)
    if side * side != length:
        raise CheckpointError(
            f'the position embedding of the file belongs to {length} patches, which '
            f'are no square grid, and the model has {new[0]}x{new[1]}; build the '
            f'model with the img_size of the file'
        )
    note = f'pos_embed was resized from {side}x{side} to {new[0]}x{new[1]}'
    return resize_position(patches, (side, side), new), [note]


def _count_blocks(state: Iterable[str]) -> int:
    blocks = [re.match(r'layers\.(\d{1,6})\.', key) for key in state]
    return max((int(match[1]) + 1 for match in blocks if match), default=0)
