"""What the tokens of large norm know: pools of tokens, and a linear head on them.

The article on Mamba® (arXiv 2405.14858) replaces the mean of all local tokens by that
of few tokens of large norm. Its protocol is not published; this is ours.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SHARES = (0.05, 0.1, 0.2)


def pool_by_norm(
    patches: Tensor, norms: Tensor, shares: Sequence[float] = SHARES
) -> dict[str, Tensor]:
    """Means of the tokens of largest norm, of the rest, and of all.

    Of M tokens a share p is round(p M) of them, but at least one.

    Args:
        patches: Local outputs (B, C, h, w).
        norms: (B, h, w), by which the tokens of an image are ranked.
        shares: Parts of the tokens, increasing, in (0, 1).

    Returns:
        Features (B, C) by name: ``top_5``, ``top_10``, ``top_20`` for these shares in
        per cent, ``rest_80`` for what the largest of them leaves, and ``all``.
    """
    tokens = patches.flatten(2).mT
    order = norms.flatten(1).argsort(dim=1, descending=True, stable=True)
    ranked = tokens.gather(1, order[..., None].expand_as(tokens))
    count = tokens.shape[1]
    pools = {}
    for share in shares:
        first = min(max(round(share * count), 1), count)
        pools[f'top_{100 * share:g}'] = ranked[:, :first].mean(1)
    rest = ranked[:, first:] if first < count else ranked
    pools[f'rest_{100 * (1 - shares[-1]):g}'] = rest.mean(1)
    pools['all'] = tokens.mean(1)
    return pools


def linear_accuracy(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    num_classes: int,
    decay: float = 1e-3,
    steps: int = 200,
) -> float:
    """Accuracy of a linear head that is trained on frozen features.

    Features are scaled by the mean and deviation of the training set. The head
    minimises the mean cross entropy plus ``decay / 2`` times the squared weights, by
    L-BFGS from zero. There is no random number in it.

    Args:
        train, test: Features (n, C) and labels (n,), integers from 0.
        num_classes: K.
        decay: Weight of the squared weights.
        steps: Most iterations.

    Returns:
        Share of the test set that is classified correctly.

    Raises:
        ValueError: A set is empty, or features are not finite.
    """
    (x, labels), (test_x, test_labels) = train, test
    if not len(x) or not len(test_x):
        raise ValueError('a linear head needs images to train and others to test')
    x, test_x = x.double(), test_x.double()
    if not (x.isfinite().all() and test_x.isfinite().all()):
        raise ValueError('the features hold NaN or infinity')
    mean, deviation = x.mean(0), x.std(0, correction=0).clamp(min=1e-12)
    x, test_x = (x - mean) / deviation, (test_x - mean) / deviation
    weight = x.new_zeros(num_classes, x.shape[1]).requires_grad_()
    bias = x.new_zeros(num_classes).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, line_search_fn='strong_wolfe'
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), labels)
        value = value + decay / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    found = F.linear(test_x, weight, bias).argmax(1)
    return (found == test_labels).double().mean().item()
