import pytest
import torch

from mmvssm.analysis.token_pooling import linear_accuracy, pool_by_norm


def test_pools_against_loops():
    torch.manual_seed(0)
    patches = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    norms = torch.rand(2, 5, 6)
    found = pool_by_norm(patches, norms)
    assert list(found) == ['top_5', 'top_10', 'top_20', 'rest_80', 'all']
    for b in range(2):
        cells = sorted(
            ((norms[b, i, j].item(), i, j) for i in range(5) for j in range(6)),
            reverse=True,
        )
        # Of 30 tokens 1.5, 3 and 6; halves are rounded to even numbers.
        chosen = dict(top_5=cells[:2], top_10=cells[:3], top_20=cells[:6])
        chosen |= dict(rest_80=cells[6:], all=cells)
        for name, places in chosen.items():
            for c in range(3):
                values = [patches[b, c, i, j].item() for _, i, j in places]
                mean = sum(values) / len(values)
                assert found[name][b, c].item() == pytest.approx(mean), name


def test_a_map_of_one_token():
    patches = torch.ones(1, 2, 1, 1)
    found = pool_by_norm(patches, torch.ones(1, 1, 1))
    assert all(pool.tolist() == [[1, 1]] for pool in found.values())


def clouds(shift, number=40):
    """Two classes, apart by ``shift`` in one channel of four."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(number) % 2
    x = torch.randn(number, 4, generator=generator)
    x[:, 2] += shift * labels
    return x, labels


def test_linear_accuracy():
    x, labels = clouds(20.0)
    train, test = (x[:30], labels[:30]), (x[30:], labels[30:])
    assert linear_accuracy(train, test, 2) == 1
    # The scale of a channel does not matter.
    scaled = [(1e4 * a + 7, b) for a, b in (train, test)]
    assert linear_accuracy(*scaled, 2) == 1
    swapped = (test[0], 1 - test[1])
    assert linear_accuracy(train, swapped, 2) == 0


def test_the_head_has_converged():
    x, labels = clouds(1.0)
    exact = linear_accuracy((x, labels), (x, labels), 2, steps=500)
    assert 0.5 < exact < 1
    assert exact == linear_accuracy((x, labels), (x, labels), 2, steps=1000)


def test_refused():
    x, labels = clouds(1.0)
    with pytest.raises(ValueError, match='needs images'):
        linear_accuracy((x, labels), (x[:0], labels[:0]), 2)
    with pytest.raises(ValueError, match='NaN or infinity'):
        linear_accuracy((x.log(), labels), (x, labels), 2)
