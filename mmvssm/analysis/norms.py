"""Norms of local tokens: artifacts of Vim, and what registers do to them.

The article on Mamba® (arXiv 2405.14858) shows that tokens of very large norm appear in
Vim's deep layers, in the background.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmvssm.analysis.tokens import layer_outputs


class LayerNorms(NamedTuple):
    """Norms of one layer.

    Attributes:
        name: See :class:`mmvssm.analysis.tokens.Layer`.
        norms: L2 norm over channels of each local token, (B, h, w).
    """

    name: str
    norms: Tensor


def token_norms(backbone: nn.Module, images: Tensor) -> list[LayerNorms]:
    """L2 norms of the local tokens after each block, with the residual stream.

    Class tokens and registers do not count.

    Args:
        backbone, images: See :func:`mmvssm.analysis.tokens.layer_outputs`.

    Returns:
        One item for each block.

    Raises:
        ValueError: See :func:`mmvssm.analysis.tokens.layer_outputs`.
    """
    with torch.no_grad():
        return layer_outputs(
            backbone,
            images,
            lambda layer: LayerNorms(layer.name, layer.patches.norm(dim=1)),
        )


def outlier_cutoff(norms: Tensor, ratio: float = 2.0) -> float:
    """The norm from which on a token counts as an outlier: a multiple of the median.

    This is our definition; the article has none.

    Args:
        norms: Of one layer, for all images, any shape.
        ratio: The multiple.
    """
    return ratio * norms.median().item()


def outlier_share(norms: Tensor, cutoff: float) -> float:
    """Share of the tokens whose norm is larger than the cut-off."""
    return (norms > cutoff).double().mean().item()


def density(norms: Tensor, edges: Tensor) -> Tensor:
    """Density of the norms in bins: it sums up to 1 over the width of the bins.

    Args:
        norms: Any shape.
        edges: Increasing edges (n + 1,) of the bins, which contain all norms.

    Returns:
        float64 (n,).
    """
    values = norms.double().flatten().cpu()
    counts = torch.histogram(values, edges.double().cpu()).hist
    return counts / (edges.double().diff() * values.numel())
