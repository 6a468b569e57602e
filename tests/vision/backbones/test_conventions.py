"""Backbones follow the conventions of MMPretrain."""

import pytest
import torch
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from mmpretrain.structures import DataSample

from tiny_cls import PARTS, build, model_config

IMAGES = (2, 3, 32, 32)


def build_with(family, head, neck=None, **backbone):
    cfg = model_config(family)
    cfg['backbone'].update(backbone)
    cfg.update(head=dict(num_classes=3, **head), neck=neck)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(cfg)


def learn(net):
    """A step reaches every parameter."""
    samples = [DataSample().set_gt_label(label) for label in (0, 2)]
    losses = net(torch.randn(IMAGES), samples, mode='loss')
    losses['loss'].backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None]
    net.eval()
    found = net(torch.randn(IMAGES), mode='predict')
    assert [sample.pred_score.shape for sample in found] == [(3,), (3,)]


@pytest.mark.parametrize('family', PARTS)
def test_pooling_and_a_linear_head(family):
    isotropic = family in ('vim', 'mambar')
    options = dict(out_type='featmap') if isotropic else dict(out_norm=True)
    if family == 'vim':
        options['cls_token'] = 'none'
    net = build_with(
        family,
        dict(type='LinearClsHead', in_channels=32 if family == 'mlla' else 16),
        dict(type='GlobalAveragePooling'),
        **options,
    )
    learn(net)


@pytest.mark.parametrize('family', ['vim', 'mambar'])
def test_the_head_of_a_vision_transformer(family):
    head = dict(type='VisionTransformerClsHead', in_channels=16)
    learn(build_with(family, head, out_type='cls_token'))
    # The mean of the patches, as its own backbones give it.
    net = build_with(
        family, dict(type='LinearClsHead', in_channels=16), out_type='avg_featmap'
    )
    assert net(torch.randn(IMAGES)).shape == (2, 3)


@pytest.mark.parametrize('family', PARTS)
def test_depths_of_layers(family):
    net = build(family)
    blocks = 2
    found = {name: net.get_layer_depth(name) for name, _ in net.named_parameters()}
    assert {last for _, last in found.values()} == {blocks + 2}
    for name, (depth, _) in found.items():
        if name.startswith('head.'):
            assert depth == blocks + 1
        elif name.startswith('backbone.patch_embed'):
            assert depth == 0
    assert {depth for depth, _ in found.values()} == {0, 1, 2, 3}


@pytest.mark.parametrize('family', PARTS)
def test_layer_wise_learning_rates_of_mmpretrain(family):
    net = build(family)
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        dict(
            type='LearningRateDecayOptimWrapperConstructor',
            optim_wrapper_cfg=dict(
                type='OptimWrapper',
                optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05),
            ),
            paramwise_cfg=dict(layer_decay_rate=0.5),
        )
    )
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        groups = constructor(net).optimizer.param_groups
    rates = {group['param_name']: group['lr'] for group in groups}
    assert set(rates) == {name for name, _ in net.named_parameters()}
    first = 'backbone.patch_embed'
    assert {rate for name, rate in rates.items() if name.startswith(first)} == {0.125}
    assert {rate for name, rate in rates.items() if name.startswith('head')} == {1.0}
    assert set(rates.values()) == {0.125, 0.25, 0.5, 1.0}
