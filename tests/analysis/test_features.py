import math

import pytest
import torch

from mmvssm.analysis.features import (
    distance_map,
    global_output,
    mean_correlation,
    register_maps,
)
from mmvssm.analysis.tokens import Layer


def layer(tokens, size=(2, 3), channels=4):
    torch.manual_seed(0)
    patches = torch.randn(1, channels, *size, dtype=torch.float64)
    extra = torch.randn(1, tokens, channels, dtype=torch.float64)
    return Layer('0', patches, extra)


@pytest.mark.parametrize('tokens', [0, 1, 3])
def test_global_output(tokens):
    out = layer(tokens)
    vectors = out.tokens[0].tolist() or out.patches[0].flatten(1).T.tolist()
    expected = [sum(column) / len(vectors) for column in zip(*vectors)]
    assert global_output(out)[0].tolist() == pytest.approx(expected)


def test_distances_against_loops():
    out = layer(1)
    target = out.tokens[0, 0].tolist()
    l2 = distance_map(out.patches, out.tokens[:, 0])[0]
    cosine = distance_map(out.patches, out.tokens[:, 0], 'cosine')[0]
    for i in range(2):
        for j in range(3):
            here = out.patches[0, :, i, j].tolist()
            assert l2[i, j].item() == pytest.approx(math.dist(here, target))
            angle = sum(a * b for a, b in zip(here, target)) / (
                math.hypot(*here) * math.hypot(*target)
            )
            assert cosine[i, j].item() == pytest.approx(1 - angle)


def test_registers_against_loops():
    out = layer(3)
    cosine, dot = register_maps(out)[0], register_maps(out, 'dot')[0]
    assert cosine.shape == (3, 2, 3)
    for n, register in enumerate(out.tokens[0].tolist()):
        for i in range(2):
            for j in range(3):
                here = out.patches[0, :, i, j].tolist()
                product = sum(a * b for a, b in zip(here, register))
                assert dot[n, i, j].item() == pytest.approx(product / 2)
                angle = product / (math.hypot(*here) * math.hypot(*register))
                assert cosine[n, i, j].item() == pytest.approx(angle)


def test_mean_correlation():
    ramp = torch.arange(6.0).view(2, 3)
    assert mean_correlation(torch.stack([ramp, 2 * ramp + 1])) == pytest.approx(1)
    assert mean_correlation(torch.stack([ramp, -ramp])) == pytest.approx(-1)
    assert mean_correlation(torch.stack([ramp, -ramp, ramp])) == pytest.approx(-1 / 3)
    assert mean_correlation(ramp[None]) is None
    assert mean_correlation(torch.stack([ramp, torch.ones(2, 3)])) is None


def test_what_there_is_not():
    out = layer(0)
    with pytest.raises(ValueError, match='neither registers nor class tokens'):
        register_maps(out)
    with pytest.raises(ValueError, match='measure must be one of'):
        register_maps(layer(1), 'l2')
    with pytest.raises(ValueError, match='distance must be one of'):
        distance_map(out.patches, global_output(out), 'dot')
