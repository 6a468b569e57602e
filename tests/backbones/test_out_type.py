"""Outputs in the forms that heads of MMPretrain take, and depths of layers."""

import pytest
import torch

from families import FAMILIES, PLAIN
from mmvssm.backbones import MambaR, Vim
from mmvssm.engine.training.layer_decay import find_depths

TOKENS = [(Vim, dict(cls_token='double')), (MambaR, {})]
kinds = pytest.mark.parametrize('cls, options', TOKENS)


@kinds
def test_each_form(cls, options):
    options = dict(options, img_size=32, classification=True)
    whole = cls(PLAIN, **options).eval()
    images = torch.randn(2, 3, 32, 32)
    ((patches, tokens),) = whole(images)
    for out_type, expected in (
        ('featmap', patches),
        ('cls_token', tokens.mean(1)),
        ('avg_featmap', patches.mean((2, 3))),
    ):
        net = cls(PLAIN, out_type=out_type, **options).eval()
        net.load_state_dict(whole.state_dict())
        (found,) = net(images)
        torch.testing.assert_close(found, expected)


@kinds
def test_of_several_blocks(cls, options):
    net = cls(PLAIN, out_type='cls_token', out_indices=(0, 1), **options)
    found = net(torch.randn(2, 3, 32, 32))
    assert [out.shape for out in found] == [(2, 16), (2, 16)]


@pytest.mark.parametrize(
    'cls, options, words',
    [
        (Vim, dict(out_type='raw'), "out_type must be one of .*, got 'raw'"),
        (Vim, dict(out_type='featmap', return_tokens=True), 'return_tokens=True'),
        (Vim, dict(out_type='avg_featmap', mask_padding=True), 'mask_padding=True'),
        (Vim, dict(out_type='cls_token'), 'needs a class token or registers'),
        (MambaR, dict(out_type='cls_token', registers=0), 'needs a class token'),
    ],
)
def test_what_contradicts_is_refused(cls, options, words):
    with pytest.raises(ValueError, match=words):
        cls(PLAIN, **options)


@pytest.mark.parametrize('family', FAMILIES)
def test_depths_of_layers(family):
    net = FAMILIES[family]()
    names = [name for name, _ in net.named_parameters()]
    depths, last = find_depths(names, 'the backbone')
    for name in names:
        assert net.get_layer_depth(name) == (depths[name], last + 1)
        assert net.get_layer_depth(f'backbone.{name}', 'backbone.') == (
            depths[name],
            last + 1,
        )
    assert net.get_layer_depth('head.fc.weight', 'backbone.') == (last, last + 1)
