"""VMamba checkpoints: formats, names and what their shapes tell."""

import re
from collections.abc import Iterable, Mapping

import torch

from mmvssm.backbones.vssm import ARCH_ZOO, VSSM
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

# Old name -> name of the current published code.
_RENAMES = (
    (r'patch_embed\.proj\.', 'patch_embed.0.'),
    (r'patch_embed\.norm\.', 'patch_embed.2.'),
    (r'(layers\.\d+\.blocks\.\d+)\.ln_1\.', r'\1.norm.'),
    (r'(layers\.\d+\.blocks\.\d+)\.self_attention\.', r'\1.op.'),
    (r'norm\.', 'classifier.norm.'),
    (r'head\.', 'classifier.head.'),
)
_RENAMES = tuple((re.compile(old), new) for old, new in _RENAMES)
BACKBONE_KEY = re.compile(r'(patch_embed|layers|outnorm\d+)\.|pos_embed$')


def rename(key: str) -> str:
    """Old or current name, without prefix -> current name."""
    for old, new in _RENAMES:
        if old.match(key):
            return old.sub(new, key, count=1)
    return key


def file_format(keys: Iterable[str]) -> str:
    """``'v0-old'``, ``'v0-new'`` or ``'v2'``."""
    keys = list(keys)
    if any(
        rename(key) != key and key.startswith(('layers.', 'patch_embed.'))
        for key in keys
    ):
        return 'v0-old'
    return 'v2' if any('.mlp.' in key for key in keys) else 'v0-new'


def reshape(key: str, value: torch.Tensor) -> torch.Tensor:
    """1x1 convolutions -> linear weights."""
    pointwise = value.ndim == 4 and value.shape[2:] == (1, 1)
    return value.flatten(1) if pointwise and '.conv2d.' not in key else value


def fit(
    state: Mapping[str, torch.Tensor], backbone: VSSM
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Nothing depends on the size of the image."""
    return dict(state), []


def describe(state: Mapping[str, torch.Tensor]) -> str:
    """Name of the arch that current keys and their shapes belong to."""
    first = 'layers.0.blocks.0.op.'
    try:
        inner, states = (
            state[first + 'dt_projs_bias'].shape[1],
            state[first + 'A_logs'].shape[1],
        )
        rows, dims = state[first + 'in_proj.weight'].shape[:2]
    except (KeyError, IndexError, ValueError):
        return 'an incomplete VMamba'
    found = dict(
        depths=count_blocks(state),
        dims=dims,
        ssm_d_state=states,
        ssm_ratio=inner / dims,
        forward_type='v0' if rows == 2 * inner else 'v05_noz',
    )
    for name, arch in ARCH_ZOO.items():
        if all(arch[key] == value for key, value in found.items()):
            return f'vmamba_{name}'
    return 'a VMamba with ' + ', '.join(
        f'{key}={value}' for key, value in found.items()
    )
