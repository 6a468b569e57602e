import pytest
import torch

from mmvssm.layers import DropPath


def test_identity_when_not_training():
    x = torch.randn(8, 3, 4, 4)
    assert DropPath(.9).eval()(x) is x
    assert DropPath(0.)(x) is x


def test_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    out = DropPath(.25)(torch.ones(4000, 2, 1, 3))
    values = out.flatten(1)
    assert (values == values[:, :1]).all()
    torch.testing.assert_close(values.unique(), torch.tensor([0., 1 / .75]))
    assert values.mean().item() == pytest.approx(1, abs=.05)


@pytest.mark.parametrize('rate', [-.1, 1., 2.])
def test_impossible_rate(rate):
    with pytest.raises(ValueError, match='drop_prob'):
        DropPath(rate)
