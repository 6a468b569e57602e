"""Recognise the family of a checkpoint, or of a model, by its keys."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mmvssm.checkpoints.errors import CheckpointError

# A key that every model of the family has and no other family; what precedes
# it is the prefix of the backbone. Mamba-R comes before Vim, whose mixer it
# shares.
_SIGNATURES = {
    'VMamba': r'layers\.\d+\.blocks\.\d+\.(op|self_attention)\.A_logs',
    'Mamba-R': r'pos_embed_cls',
    'Vim': r'layers\.\d+\.mixer\.A_b_log',
    'MLLA': r'layers\.\d+\.blocks\.\d+\.attn\.qk\.weight',
}
_SIGNATURES = {
    family: re.compile(rf'(?P<prefix>(?:.*\.)?){signature}')
    for family, signature in _SIGNATURES.items()
}


@dataclass(frozen=True)
class Recognised:
    """Whose keys these are.

    Attributes:
        family: ``'VMamba'``, ``'Vim'``, ``'Mamba-R'`` or ``'MLLA'``.
        prefix: What precedes the backbone's own names, such as ``'backbone.'``.
    """

    family: str
    prefix: str


def recognise(keys: Iterable[str], what: str) -> Recognised:
    """Find family and prefix.

    Args:
        keys: Names of a state dict.
        what: How to call their owner in an error message.

    Raises:
        CheckpointError: No family, or several backbones in one state dict.
    """
    keys = list(keys)
    for family, signature in _SIGNATURES.items():
        prefixes = {
            match['prefix'] for match in map(signature.fullmatch, keys) if match
        }
        if len(prefixes) > 1:
            raise CheckpointError(
                f'{what} has several {family} backbones: '
                f'{sorted(prefixes)}; choose one with prefix='
            )
        if prefixes:
            return Recognised(family, prefixes.pop())
    raise CheckpointError(
        f'{what} is of none of the families {list(_SIGNATURES)}; its keys '
        f'start with {keys[:5]}'
    )
