"""Published files go into MMPretrain's ``ImageClassifier`` by its own ways."""

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from mmengine.runner.checkpoint import load_checkpoint, load_state_dict

import mmvssm
from mmvssm.errors import CheckpointError
from tiny_cls import PARTS, build, model_config

IMAGES = (2, 3, 32, 32)


def published(net):
    """Names as the authors' files have them."""
    state = {}
    for name, value in net.state_dict().items():
        name = name.removeprefix('backbone.').removeprefix('head.')
        state[name] = value
    vim_like = any(name.startswith('norm_f') for name in state)
    if vim_like:
        state = {name.removeprefix('classifier.'): v for name, v in state.items()}
    return state


@pytest.fixture(params=PARTS)
def family(request):
    return request.param


def same(one, other):
    images = torch.randn(IMAGES)
    return torch.equal(one.eval()(images), other.eval()(images))


def test_init_cfg(family, tmp_path):
    source, file = build(family), tmp_path / 'published.pth'
    torch.save(dict(model=published(source), optimizer={}, epoch=3), file)
    cfg = dict(
        model_config(family), init_cfg=dict(type='Pretrained', checkpoint=str(file))
    )
    from mmengine.registry import DefaultScope
    from mmpretrain.registry import MODELS

    with DefaultScope.overwrite_default_scope('mmpretrain'):
        net = MODELS.build(cfg)
    assert not same(net, source)
    net.init_weights()
    assert same(net, source)


def test_load_from(family, tmp_path):
    """What a runner does for ``load_from``."""
    source, net = build(family), build(family)
    file = tmp_path / 'published.pth'
    torch.save(published(source), file)
    load_checkpoint(net, str(file))
    assert same(net, source)


def test_own_checkpoints_stay_as_they_are(family):
    source, net = build(family), build(family)
    before = source.state_dict()
    load_state_dict(net, before, strict=True)
    net.load_state_dict(before, strict=True)
    assert same(net, source)
    assert list(before) == list(net.state_dict())


def test_an_average_of_weights(family):
    """Its names have a prefix, and the filter is copied with the model."""
    source = build(family)
    average = ExponentialMovingAverage(build(family))
    average.load_state_dict(
        {f'module.{k}': v for k, v in source.state_dict().items()}, strict=False
    )
    assert same(average.module, source)
    other = build(family)
    average.module.load_state_dict(published(other))
    assert same(average.module, other)


def test_position_embeddings_are_resized():
    small = build('vim')
    cfg = model_config('vim')
    cfg['backbone'].update(img_size=64)
    from mmpretrain.registry import MODELS

    large = MODELS.build(cfg)
    load_state_dict(large, published(small), strict=True)
    expected = MODELS.build(cfg)
    mmvssm.load_checkpoint(expected, published(small))
    assert large.backbone.pos_embed.shape == (1, 257, 16)
    torch.testing.assert_close(
        large.backbone.pos_embed, expected.backbone.pos_embed, rtol=0, atol=0
    )


def test_another_family_is_refused():
    with pytest.raises(CheckpointError, match='holds VMamba weights, .* Vim is Vim'):
        build('vim').load_state_dict(published(build('vmamba')))


def test_what_is_of_no_family_is_left_to_the_loader():
    net = build('vim')
    missing = net.load_state_dict({'a': torch.zeros(1)}, strict=False)
    assert missing.unexpected_keys == ['a']
