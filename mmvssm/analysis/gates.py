"""Input and forget gate of a mixer on an image (MLLA, arXiv 2405.16605, Fig. 4 and 5).

The article reads a selective scan as linear attention: the step size Δ decides how much
of a place enters the state (input gate), exp(Δ A) how much of the state stays (forget
gate).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmvssm.analysis.attention import MERGED
from mmvssm.analysis.routes import MIXERS, LinearRoute, Mixing, ScanRoute


def input_gates(mixing: Mixing) -> dict[str, Tensor]:
    """The input gate Δ over the map, averaged over the channels.

    Args:
        mixing: Of :func:`mmvssm.analysis.routes.record_mixings`.

    Returns:
        A map (H, W) for each route, and ``'merged'``, their mean. Nothing for a mixer
        without an input gate.
    """
    found = {}
    for name, route in mixing.routes.items():
        if isinstance(route, LinearRoute):
            if route.dt is None:
                continue
            by_place = route.dt.mean(0)
        elif not torch.equal(route.columns, route.dt):
            # Its step sizes only say how fast the state decays.
            continue
        else:
            real = route.places >= 0
            along = route.dt.mean(0)
            by_place = torch.empty_like(along[real])
            by_place[route.places[real]] = along[real]
        found[name] = by_place[mixing.patches].view(mixing.size)
    if found:
        found[MERGED] = sum(found.values()) / len(found)
    return found


def forget_gates(mixing: Mixing) -> dict[str, float]:
    """The forget gate exp(Δ A), averaged over positions, channels and states.

    Args:
        mixing: See :func:`input_gates`.

    Returns:
        One number for each scan, and ``'merged'``, their mean. Nothing for a mixer
        without a state that decays. Padded places do not count.
    """
    found = {}
    for name, route in _scans(mixing):
        dt = route.dt[:, route.places >= 0]
        gates = [torch.exp(route.A[:, n, None] * dt).double().mean() for n in _n(route)]
        found[name] = float(sum(gates) / len(gates))
    if found:
        found[MERGED] = sum(found.values()) / len(found)
    return found


def decay(mixing: Mixing, distances: Sequence[int]) -> list[float]:
    """What is left of a place in the state so many positions later.

    Averaged over all pairs of positions with that distance, over channels, states and
    scans: the mean of exp(A (S[t + k] - S[t])), with the sums S of the step sizes. It
    is at least the k-th power of the mean forget gate, by which the article draws it:
    a mean over channels that forget fast and channels that do not forget.

    Args:
        mixing: See :func:`input_gates`.
        distances: k, from 0 on, each below the length of the sequence.

    Returns:
        One number for each distance; nothing for a mixer without a state that decays.

    Raises:
        ValueError: A distance is negative or too long.
    """
    found = []
    for _, route in _scans(mixing):
        total = route.dt.double().cumsum(1)
        length = total.shape[1]
        if not all(0 <= k < length for k in distances):
            raise ValueError(
                f'distances must be 0 to {length - 1} in a sequence of {length} '
                f'positions, got {list(distances)}'
            )
        A = route.A.double()
        found.append(
            [
                sum(
                    torch.exp(
                        A[:, n, None] * (total[:, k:] - total[:, : length - k])
                    ).mean()
                    for n in _n(route)
                )
                / A.shape[1]
                for k in distances
            ]
        )
    return [float(sum(values) / len(values)) for values in zip(*found)]


def _scans(mixing: Mixing) -> Iterator[tuple[str, ScanRoute]]:
    for name, route in mixing.routes.items():
        if isinstance(route, ScanRoute):
            yield name, route


def _n(route: ScanRoute) -> range:
    return range(route.A.shape[1])


@contextmanager
def without_normalisation(backbone: nn.Module) -> Iterator[bool]:
    """Run linear attention without its normaliser inside of the ``with``.

    The weights stay those of a training with it, unless there was none. The article
    trains a model without it.

    Yields:
        Whether a mixer of the backbone has a normaliser.
    """
    changed = [
        module
        for module in backbone.modules()
        if isinstance(module, MIXERS) and getattr(module, 'normalise', False)
    ]
    for module in changed:
        module.normalise = False
    try:
        yield bool(changed)
    finally:
        for module in changed:
            module.normalise = True
