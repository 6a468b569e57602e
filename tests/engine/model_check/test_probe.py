"""A look at a model leaves nothing behind."""

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from torch import nn

import tiny
from mmvssm.engine.model_check.probe import (
    MadeUpMaps,
    look,
    lost_parameters,
    run_backbone,
    without_traces,
)
from mmvssm.engine.model_check.samples import segmentation_sample

pytest.importorskip('mmseg')
SIZE = (64, 64)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp('model')
    cfg = Config.fromfile(tiny.write_config(root / 'a.py', root, norm="type='BN'"))
    cfg.model.backbone.drop_path_rate = 0.3
    cfg.model.decode_head.dropout_ratio = 0.3
    init_default_scope('mmseg')
    return MODELS.build(cfg.model)


def state_of(model):
    """Values, versions, gradients, modes and hooks."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return dict(
        values={name: x.detach().clone() for name, x in tensors},
        others=[
            *[
                (name, id(x), x._version, x.grad, x.requires_grad)
                for name, x in tensors
            ],
            *[(name, m.training) for name, m in model.named_modules()],
            *[(name, len(m._forward_pre_hooks)) for name, m in model.named_modules()],
        ],
    )


def numbers():
    """States of the generators."""
    name, keys, *rest = np.random.get_state()
    return (
        random.getstate(),
        (name, keys.tobytes(), *rest),
        torch.get_rng_state().numpy().tobytes(),
    )


@pytest.mark.parametrize('mode', [True, False])
def test_nothing_changes(model, mode, monkeypatch):
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    model.train(mode)
    before, drawn, initialized = state_of(model), numbers(), dist.is_initialized
    with without_traces():
        random.random(), np.random.rand(), torch.rand(1)
        seen = look(model, SIZE, segmentation_sample(SIZE))
        lost = lost_parameters(model.backbone, SIZE, [3])
        assert not dist.is_initialized()
    assert seen.all_used and seen.single == ['decode_head.psp_modules.0.1.bn']
    assert lost == [
        f'backbone.outnorm{i}.{x}' for i in range(3) for x in ('weight', 'bias')
    ]
    after = state_of(model)
    assert after['others'] == before['others']
    for name, value in before['values'].items():
        assert torch.equal(after['values'][name], value), name
    assert numbers() == drawn and dist.is_initialized is initialized


def test_nothing_changes_where_it_fails(model):
    drawn, initialized = numbers(), dist.is_initialized
    with pytest.raises(KeyError), without_traces():
        torch.rand(1)
        raise KeyError
    assert numbers() == drawn and dist.is_initialized is initialized


def test_it_sees_the_same_every_time(model):
    first, second = (look(model, SIZE, segmentation_sample(SIZE)) for _ in range(2))
    assert first == second


def test_known_shapes_are_those_that_the_backbone_makes(model):
    for size in ((64, 64), (96, 40)):
        maps, _, _ = run_backbone(model.backbone, size)
        known = look(model, size, segmentation_sample(size)).shapes
        assert known == [tuple(x.shape) for x in maps]


def test_a_layer_may_change_the_maps_in_place():
    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            self.backbone = MadeUpMaps([(1, 4, 2, 2)] * 2)
            self.head = nn.Conv2d(4, 1, 1)

        def forward(self, inputs, data_samples, mode):
            return dict(loss=self.head(self.backbone(inputs)[1].relu_()).sum())

    assert look(Model(), SIZE, segmentation_sample(SIZE)).used == [1]
