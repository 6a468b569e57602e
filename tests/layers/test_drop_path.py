import pytest
import torch

from mmvssm.layers import DropPath


def test_identity_when_not_training():
    x = torch.randn(8, 3, 4, 4)
    assert DropPath(0.9).eval()(x) is x
    assert DropPath(0.0)(x) is x


def test_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    out = DropPath(0.25)(torch.ones(4000, 2, 1, 3))
    values = out.flatten(1)
    assert (values == values[:, :1]).all()
    torch.testing.assert_close(values.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert values.mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize('rate', [-0.1, 1.0, 2.0])
def test_impossible_rate(rate):
    with pytest.raises(ValueError, match='drop_prob'):
        DropPath(rate)
