"""Class activation maps, and the layers and maps that they are made of."""

import pytest
import torch
from torch import nn

import families
from mmvssm.analysis.cam import ToMap, grad_cam, target_layer_and_reshape
from mmvssm.backbones import MambaR, Vim
from mmvssm.families import families as all_families
from mmvssm.heads import ClassTokenHead, ImageClassifier


def test_grad_cam_by_hand():
    """Of sum_c a_c sum_p w_p F[c, p] the mean gradients are a_c times the mean w."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 1)
    image, places = torch.randn(1, 3, 5, 6), torch.rand(5, 6)
    a = torch.tensor([1.0, -2.0, 0.5, 3.0])[:, None, None]
    maps = layer(image)[0].detach()
    want = (a * maps).sum(0).clamp(min=0)

    def score():
        return (a * places * layer(image)[0]).sum()

    found = grad_cam(layer, lambda x: x, score)
    torch.testing.assert_close(found, want / want.max())
    # Frozen weights and an outer no_grad change nothing.
    layer.requires_grad_(False)
    with torch.no_grad():
        again = grad_cam(layer, lambda x: x, score)
    torch.testing.assert_close(again, found)
    assert not layer._forward_hooks


@pytest.mark.parametrize(
    ('score', 'text'),
    [
        (lambda layer, x: -layer(x.abs()).abs().sum(), 'zero everywhere'),
        (lambda layer, x: (layer(x) * float('inf')).sum(), 'not finite'),
        (lambda layer, x: layer(x).detach().sum(), 'does not depend on the layer'),
        (lambda layer, x: x.sum(), 'does not run in this model'),
    ],
)
def test_a_map_of_nothing_is_an_error(score, text):
    layer = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(layer.weight)
    with pytest.raises(ValueError, match=text):
        grad_cam(layer, lambda x: x, lambda: score(layer, torch.ones(1, 1, 2, 2)))
    assert not layer._forward_hooks


@pytest.mark.parametrize('name', families.FAMILIES)
def test_target_layer_and_reshape(name):
    """The map is that of the image, of any size, without extra tokens."""
    torch.manual_seed(0)
    net = families.FAMILIES[name]().eval()
    layer, reshape = target_layer_and_reshape(net)
    record = next(f for f in all_families() if isinstance(net, f.backbone))
    assert layer is record.target_layer(net)
    seen = []
    layer.register_forward_hook(lambda module, args, out: seen.append(out))
    for height, width in ((32, 48), (40, 32)):
        with torch.no_grad():
            maps = net(torch.randn(2, 3, height, width))
        got = reshape(seen.pop())
        assert got.shape == maps[-1].shape
        if net.__class__ in (Vim, MambaR):
            assert got.shape[2:] == (height // 4, width // 4)


def test_tokens_are_taken_out():
    net = MambaR(dict(embed_dims=4, depth=2, patch_size=4, stride=4, registers=3))
    reshape = ToMap(net)
    net(torch.randn(1, 3, 8, 20))
    places = net.token_positions(10)
    sequence = torch.full((1, 13, 4), -1.0)
    patches = [place for place in range(13) if place not in places]
    sequence[0, patches] = torch.arange(10.0)[:, None]
    assert reshape(sequence)[0, 0].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    # Blocks return pairs.
    assert reshape((sequence, None)).shape == (1, 4, 2, 5)
    with pytest.raises(ValueError, match='12 positions is none of 2 x 5 patches and 3'):
        reshape(sequence[:, 1:])
    with pytest.raises(ValueError, match=r'needs a layer that gives a map'):
        reshape(sequence[0])


@pytest.mark.parametrize('name', ['vim', 'mambar'])
def test_tokens_let_the_map_through(name):
    """The class token is the only output, and the map is not zero."""
    torch.manual_seed(0)
    net = families.FAMILIES[name](classification=True)
    model = ImageClassifier(net, ClassTokenHead(16, 5)).eval()
    layer, reshape = target_layer_and_reshape(model)
    image = torch.randn(1, 3, 32, 48)
    logits = model(image)[0].detach()
    found = grad_cam(layer, reshape, lambda: model(image)[0, logits.argmax()])
    assert found.shape == (8, 12) and found.max() == 1


def test_another_package():
    with pytest.raises(ValueError, match='Linear belongs to no family'):
        target_layer_and_reshape(nn.Linear(1, 1))
