"""How local outputs relate to the global output, and to registers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvssm.analysis.tokens import Layer

DISTANCES = ('l2', 'cosine')
MEASURES = ('cosine', 'dot')


def global_output(out: Layer) -> Tensor:
    """The global output of a backbone, of the size of a local one.

    It is the class token, or the mean of several class tokens or registers, or without
    such tokens the mean of the local outputs, which a pooling head takes. For Mamba®
    that is our definition: its head sees its registers side by side, and that cannot
    be compared to one local output.

    Args:
        out: The last map with its tokens.

    Returns:
        (B, C).
    """
    if out.tokens.shape[1]:
        return out.tokens.mean(1)
    return out.patches.mean((2, 3))


def distance_map(patches: Tensor, target: Tensor, distance: str = 'l2') -> Tensor:
    """Distance between an output and each local output (arXiv 2405.14858).

    Args:
        patches: Local outputs (B, C, h, w).
        target: (B, C).
        distance: ``'l2'``, or ``'cosine'`` for 1 minus the cosine of the angle.

    Returns:
        (B, h, w).

    Raises:
        ValueError: There is no such distance.
    """
    if distance not in DISTANCES:
        raise ValueError(f'distance must be one of {DISTANCES}, got {distance!r}')
    target = target[:, :, None, None]
    if distance == 'l2':
        return (patches - target).norm(dim=1)
    return 1 - F.cosine_similarity(patches, target, dim=1)


def register_maps(out: Layer, measure: str = 'cosine') -> Tensor:
    """Where each register looks: how much each local output is like it.

    This is our definition; that of the article is not published.

    Args:
        out: The last map with its tokens.
        measure: ``'cosine'`` of the angle between the outputs, or ``'dot'``, their
            product divided by the root of C.

    Returns:
        (B, n, h, w), one map for each register or class token.

    Raises:
        ValueError: There is no such measure, or there are no extra tokens.
    """
    if measure not in MEASURES:
        raise ValueError(f'measure must be one of {MEASURES}, got {measure!r}')
    patches, tokens = out.patches, out.tokens
    if not tokens.shape[1]:
        raise ValueError('there are neither registers nor class tokens')
    scale = patches.shape[1] ** 0.5
    if measure == 'cosine':
        patches, tokens = F.normalize(patches, dim=1), F.normalize(tokens, dim=2)
        scale = 1.0
    return torch.einsum('bnc,bchw->bnhw', tokens, patches) / scale


def mean_correlation(maps: Tensor) -> float | None:
    """Mean correlation between pairs of maps: 1 where all look at the same places.

    Args:
        maps: (n, h, w).

    Returns:
        In [-1, 1]; None for a single map, or where one is constant.
    """
    flat = maps.double().flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    lengths = flat.norm(dim=1, keepdim=True)
    count = len(flat)
    if count < 2 or not (lengths > 0).all():
        return None
    flat = flat / lengths
    together = flat @ flat.T
    return ((together.sum() - together.trace()) / (count * (count - 1))).item()
