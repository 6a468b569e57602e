"""What docs/classification.md shows holds."""

import re

import pytest
import torch
from mmengine.registry import DefaultScope
from mmpretrain.structures import DataSample

from mmvssm.engine import (
    check_datasets,
    check_labels,
    choose_start,
    load_config,
    scope_of,
)
from mmvssm.registry import MODELS
from tiny import REPO
from tiny_cls import write_folders

PAGE = (REPO / 'docs/classification.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', PAGE, re.S)


def example(start):
    (block,) = (block for block in BLOCKS if block.startswith(start))
    return block


@pytest.mark.parametrize(
    'start, classes, weights',
    [
        ("default_scope = 'mmpretrain'", 1000, []),
        ("_base_ = 'mmvssm::class", 2, ['mmvssm://vmamba_t_s1l8']),
        ("_base_ = 'mmpretrain::swin", 1000, []),
    ],
    ids=['whole', 'own images', 'inherited'],
)
def test_configs(start, classes, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folders('data/mine', ('cat', 'dog'), train=1, val=1)
    (tmp_path / 'page.py').write_text(example(start))
    cfg = load_config('page.py')
    if classes == 2:
        check_datasets(cfg, ('train', 'val', 'test'))
        check_labels(cfg)
        pipeline = cfg.train_dataloader.dataset.pipeline
        assert pipeline[1].type == 'RandomResizedCrop'
    assert choose_start(cfg) == weights
    cfg.model.init_cfg = None
    with DefaultScope.overwrite_default_scope(scope_of(cfg)):
        net = MODELS.build(cfg.model)
    losses = net(torch.randn(1, 3, 64, 64), [DataSample().set_gt_label(1)], mode='loss')
    assert losses['loss'].isfinite()
    assert net(torch.randn(1, 3, 64, 64)).shape == (1, classes)
