"""The implicit attention of selective scans and of linear attention.

A selective scan is a product with a lower-triangular matrix (VMamba, arXiv 2401.10166,
section 5 and appendix; the equations there are in terms of Q = C, K = B, V = Δ u and
the cumulated decays w). Of channel d, with the sums S of its step sizes, it is

    M_d[t, s] = sum_n C[n, t] exp(A[d, n] (S[d, t] - S[d, s])) B[n, s] Δ[d, s],  s <= t,

plus D[d] on the diagonal. The article writes the exponential as w[t] / w[s], which
underflows in long sequences; the difference of the cumulated logarithms does not.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmvssm.analysis.routes import LinearRoute, Mixing, ScanRoute

MODES = ('CB', 'CBdt', 'decayed')
MERGED = 'merged'
# Values of a block of channels.
_BLOCK = 2**22


def scan_matrix(route: ScanRoute, channel: int, skip: bool = True) -> Tensor:
    """The matrix that one channel of a scan multiplies its values by.

    Args:
        route: The scan.
        channel: d.
        skip: Add D on the diagonal.

    Returns:
        (L, L), in the order of the scan: ``matrix @ values[channel]`` is the output.
    """
    group = channel // (len(route.dt) // len(route.B))
    total = _cumulate(route.dt[channel : channel + 1])
    positions = torch.arange(total.shape[1], device=total.device)
    gaps = _gaps(total, positions)[0].to(route.dt.dtype)
    A, B, C = route.A[channel], route.B[group], route.C[group]
    matrix = torch.zeros_like(gaps)
    for n in range(len(A)):
        matrix += C[n][:, None] * torch.exp(A[n] * gaps) * B[n]
    matrix = (matrix * route.columns[channel]).tril()
    if route.rows is not None:
        matrix *= route.rows[channel][:, None]
    if skip and route.D is not None:
        matrix += torch.diag(route.D[channel].to(matrix).expand(len(matrix)))
    return matrix


def attention(
    route: ScanRoute | LinearRoute, mode: str, queries: Sequence[int] | None = None
) -> Tensor:
    """The implicit attention of a route, averaged over its channels.

    Args:
        route: A scan, or linear attention.
        mode: ``'CB'``: inner products of C of the query and B of the key; of linear
            attention, those of the features of query and key. ``'CBdt'``: these times
            Δ of the key; linear attention has no Δ unless it has an input gate.
            ``'decayed'``: what the layer multiplies its values by, with the decay
            between key and query; of linear attention, with rotation and
            normalisation. The skip weights D are in none of them.
        queries: Positions of the queries; None for all.

    Returns:
        (Q, L), in the order of the scan. In a scan a query sees no later key.

    Raises:
        ValueError: There is no such mode.
    """
    if mode not in MODES:
        raise ValueError(f'mode must be one of {MODES}, got {mode!r}')
    if isinstance(route, LinearRoute):
        return _linear_attention(route, mode, queries)
    length = route.dt.shape[1]
    if queries is None:
        queries = range(length)
    at = torch.as_tensor(list(queries), device=route.dt.device)
    if mode == 'decayed':
        found = _decayed(route, at)
    else:
        pairs = torch.einsum('gnq,gns->gqs', route.C[:, :, at], route.B)
        if mode == 'CBdt':
            # Channels of a group share B and C.
            pairs = pairs * route.dt.unflatten(0, (len(pairs), -1)).mean(1)[:, None]
        found = pairs.mean(0)
    later = torch.arange(length, device=at.device) > at[:, None]
    return found.masked_fill(later, 0)


def _decayed(route: ScanRoute, at: Tensor) -> Tensor:
    """Mean over the channels of :func:`scan_matrix` without D, of some rows (Q, L)."""
    channels, length = route.dt.shape
    total, width = _cumulate(route.dt), channels // len(route.B)
    found = route.dt.new_zeros(len(at), length)
    block = max(1, _BLOCK // (len(at) * length))
    for group in range(len(route.B)):
        last = (group + 1) * width
        B, C = route.B[group], route.C[group][:, at]
        for first in range(group * width, last, block):
            part = slice(first, min(first + block, last))
            gaps = _gaps(total[part], at).to(found.dtype)
            mixed = torch.zeros_like(gaps)
            for n in range(len(B)):
                decay = torch.exp(route.A[part, n, None, None] * gaps)
                mixed += decay.mul_(C[n][:, None]).mul_(B[n])
            mixed *= route.columns[part][:, None]
            if route.rows is not None:
                mixed *= route.rows[part][:, at, None]
            found += mixed.sum(0)
    return found / channels


def _cumulate(dt: Tensor) -> Tensor:
    """Sums of the step sizes, (D, L), as exact as differences of them need."""
    return dt.double().cumsum(1)


def _gaps(total: Tensor, at: Tensor) -> Tensor:
    """The step sizes between key and query added up, (D, Q, L); 0 for later keys."""
    return (total[:, at, None] - total[:, None]).clamp_(min=0)


def _linear_attention(
    route: LinearRoute, mode: str, queries: Sequence[int] | None
) -> Tensor:
    weights = route.weights if mode == 'decayed' else route.products
    if queries is not None:
        weights = weights[:, list(queries)]
    if route.dt is not None and mode != 'CB':
        gates = route.dt.unflatten(0, (len(weights), -1)).mean(1)
        weights = weights * gates[:, None].to(weights.dtype)
    return weights.mean(0)


def raster_rows(mixing: Mixing, mode: str, query: int) -> dict[str, Tensor]:
    """What one patch attends to, along each route and merged.

    Args:
        mixing: Of :func:`mmvssm.analysis.routes.record_mixings`.
        mode: See :func:`attention`.
        query: Number of the patch, row by row of the map.

    Returns:
        A map (H, W) for each route, and ``'merged'``: their sum, as the layer merges
        its routes (in Vim and Mamba® their mean).
    """
    places = mixing.patches[query : query + 1]
    return {
        name: row.view(mixing.size)
        for name, row in _of_patches(mixing, mode, places).items()
    }


def raster_matrices(mixing: Mixing, mode: str) -> dict[str, Tensor]:
    """What all patches attend to, along each route and merged.

    Args:
        mixing, mode: See :func:`raster_rows`.

    Returns:
        A matrix (H W, H W) for each route and ``'merged'``; queries in its rows and
        keys in its columns, both numbered row by row of the map.
    """
    return _of_patches(mixing, mode, mixing.patches)


def _of_patches(mixing: Mixing, mode: str, places: Tensor) -> dict[str, Tensor]:
    found = {}
    for name, route in mixing.routes.items():
        if isinstance(route, ScanRoute):
            rows = _by_place(route, mode, places)
        else:
            rows = attention(route, mode, places.tolist())
        found[name] = rows[:, mixing.patches]
    found[MERGED] = mixing.scale * sum(found.values())
    return found


def _by_place(route: ScanRoute, mode: str, places: Tensor) -> Tensor:
    """Rows of some places over all places; padded places are left out."""
    real = (route.places >= 0).nonzero().flatten()
    positions = torch.empty_like(real)
    positions[route.places[real]] = real
    rows = attention(route, mode, positions[places].tolist())
    return rows[:, positions]


def rollout(matrices: Sequence[Tensor], share: float = 0.5) -> Tensor:
    """Attention through several layers (attention roll-out, arXiv 2005.00928).

    Each matrix is made one of weights: its absolute values over their largest, mixed
    with the identity, which stands for the shortcut of the block, and divided by the
    sums of the rows. The result is their product, the last layer on the left.

    Args:
        matrices: (L, L) of the layers, from the image on.
        share: Part of the attention; the identity has the rest.

    Returns:
        (L, L), rows sum up to 1.

    Raises:
        ValueError: There is no matrix.
    """
    if not matrices:
        raise ValueError('a roll-out needs the matrix of one layer at least')
    found = None
    for matrix in matrices:
        weights = matrix.abs()
        weights = weights / weights.max().clamp(min=torch.finfo(weights.dtype).tiny)
        weights = share * weights + (1 - share) * torch.eye(
            len(weights), dtype=weights.dtype, device=weights.device
        )
        weights = weights / weights.sum(1, keepdim=True)
        found = weights if found is None else weights @ found
    return found
