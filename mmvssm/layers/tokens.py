"""Extra tokens (class tokens, registers) in a sequence of patches."""

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise, zip_longest

import torch
from torch import Tensor

PLACEMENTS = ('even', 'head', 'middle', 'ends')


def token_positions(patches: int, tokens: int, placement: str) -> tuple[int, ...]:
    """Indices of the extra tokens in the sequence.

    Args:
        patches: Number of patches M.
        tokens: Number of extra tokens n.
        placement: ``'even'``: one token after each of the first n groups of M // (n +
            1) patches, as in Mamba® (arXiv 2405.14858, section 3.2). ``'head'``: all
            before the patches. ``'middle'``: all together after M // 2 patches.
            ``'ends'``: two tokens, the first and the last of the sequence.

    Returns:
        Increasing indices into the sequence of length M + n.

    Raises:
        ValueError: The placement is unknown, or it is ``'ends'`` and n is not 2.
    """
    if placement not in PLACEMENTS or (placement == 'ends' and tokens != 2):
        raise ValueError(
            f'cannot place {tokens} tokens at {placement!r}; placements are '
            f'{PLACEMENTS}, and ends takes two tokens'
        )
    if placement == 'ends':
        return 0, patches + 1
    if placement == 'even':
        step = patches // (tokens + 1) + 1
        return tuple(step * (k + 1) - 1 for k in range(tokens))
    first = patches // 2 if placement == 'middle' else 0
    # range(first, first + tokens) would tie a compiled graph to one size.
    return tuple(first + k for k in range(tokens))


def insert_tokens(patches: Tensor, tokens: Tensor, positions: Sequence[int]) -> Tensor:
    """Insert tokens into a sequence of patches.

    Args:
        patches: (B, M, ...).
        tokens: (B, n, ...).
        positions: Increasing indices of the tokens in the result.

    Returns:
        Sequence (B, M + n, ...).
    """
    if not positions:
        return patches
    runs = _split(patches, _runs(positions, patches.shape[1]))
    pieces = chain.from_iterable(zip_longest(runs, tokens.split(1, dim=1)))
    return torch.cat([piece for piece in pieces if piece is not None], dim=1)


def split_tokens(sequence: Tensor, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Separate patches and tokens; the inverse of :func:`insert_tokens`.

    Returns:
        Patches (B, M, ...) and tokens (B, n, ...).
    """
    if not positions:
        return sequence, sequence[:, :0]
    runs = _runs(positions, sequence.shape[1] - len(positions))
    sizes = list(chain.from_iterable(zip(runs, [1] * len(runs))))[:-1]
    pieces = _split(sequence, sizes)
    return torch.cat(pieces[::2], dim=1), torch.cat(pieces[1::2], dim=1)


def _split(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Parts of a sequence (B, L, ...) of these lengths."""
    if not torch.compiler.is_compiling():
        return x.split(sizes, dim=1)
    # Slices, because ONNX splits into a number of parts and not by computed lengths.
    starts = accumulate(sizes, initial=0)
    return [x.narrow(1, start, size) for start, size in zip(starts, sizes)]


def _runs(positions: Sequence[int], patches: int) -> list[int]:
    """Numbers of patches before, between and after the tokens."""
    bounds = (-1, *positions, patches + len(positions))
    return [b - a - 1 for a, b in pairwise(bounds)]
