import math

import pytest
import torch

from families import FAMILIES
from mmvssm.analysis.norms import density, outlier_cutoff, outlier_share, token_norms
from mmvssm.analysis.tokens import layer_outputs


@pytest.mark.parametrize('name', FAMILIES)
def test_norms_against_loops(name):
    """In float64, by Python's own arithmetic."""
    torch.manual_seed(0)
    backbone = FAMILIES[name]().double().eval()
    images = torch.randn(1, 3, 32, 24, dtype=torch.float64)
    found = token_norms(backbone, images)
    with torch.no_grad():
        layers = layer_outputs(backbone, images)
    assert [x.name for x in found] == [x.name for x in layers]
    for layer, norms in zip(layers, found):
        _, channels, height, width = layer.patches.shape
        assert norms.norms.shape == (1, height, width)
        values = layer.patches[0].tolist()
        for i in range(height):
            for j in range(width):
                total = sum(values[c][i][j] ** 2 for c in range(channels))
                expected = math.sqrt(total)
                assert norms.norms[0, i, j].item() == pytest.approx(expected, 1e-12)


def test_no_gradients_are_kept():
    backbone = FAMILIES['vim']().eval()
    assert not token_norms(backbone, torch.zeros(1, 3, 32, 32))[0].norms.requires_grad


def test_outliers():
    norms = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.5, 30.0]])
    assert outlier_cutoff(norms) == 2.0
    assert outlier_cutoff(norms, 3) == 3.0
    assert outlier_share(norms, 2.0) == pytest.approx(2 / 6)


def test_density():
    norms = torch.tensor([0.1, 0.2, 0.9, 3.0])
    edges = torch.tensor([0.0, 0.5, 1.0, 3.0])
    assert density(norms, edges).tolist() == pytest.approx([1.0, 0.5, 0.125])
    assert (density(norms, edges) * edges.double().diff()).sum().item() == 1.0
