"""Configs of MMPretrain with one of our backbones in the place of theirs."""

import os

import pytest
from mmengine.registry import DefaultScope

import warm
from mmvssm.engine import is_classifier, load_config
from mmvssm.registry import MODELS
from tiny import REPO
from tiny_cls import PLAIN, write_folders

SWIN = """
_base_ = 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py'
model = dict(
    backbone=dict(
        _delete_=True, type='mmvssm.VSSM', arch=dict(depths=(1, 1), dims=8),
        out_indices=(1,), drop_path_rate=0.2),
    head=dict(in_channels=16, num_classes=3))
"""
DEIT = f"""
_base_ = 'mmpretrain::deit/deit-tiny_4xb256_in1k.py'
model = dict(
    backbone=dict(
        _delete_=True, type='mmvssm.Vim', arch={PLAIN}, img_size=224,
        classification=True, cls_token='middle', out_type='cls_token'),
    head=dict(in_channels=16, num_classes=3))
"""
# Class folders, small images, one epoch.
DATA = """
data_preprocessor = dict(num_classes=3)
data = dict(
    _delete_=True, type='CustomDataset', data_root={root!r}, data_prefix='train',
    pipeline=[
        dict(type='LoadImageFromFile'), dict(type='RandomResizedCrop', scale=32),
        dict(type='PackInputs')])
small = dict(
    batch_size=2, num_workers=0, persistent_workers=False, dataset=data,
    sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True))
train_dataloader, val_dataloader, test_dataloader = small, small, small
val_evaluator = dict(topk=(1, 2))
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
param_scheduler = None
"""


@pytest.mark.parametrize('name, text', [('swin', SWIN), ('deit', DEIT)])
def test_it_trains(name, text, tmp_path):
    root = write_folders(tmp_path / 'data', train=1, val=1)
    path = tmp_path / f'{name}.py'
    path.write_text(text + DATA.format(root=str(root)))
    done = warm.run(
        [REPO / 'tools/train.py', path.name],
        cwd=tmp_path,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        merge=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert 'accuracy/top1' in done.stdout
    assert (tmp_path / f'work_dirs/{name}/epoch_1.pth').is_file()


def test_the_backbone_starts_as_published(tmp_path):
    """The inherited ``init_cfg`` is for all linear layers of a transformer."""
    path = tmp_path / 'deit.py'
    path.write_text(DEIT)
    cfg = load_config(str(path))
    assert is_classifier(cfg)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        net = MODELS.build(cfg.model)
    assert any(entry['layer'] == 'Linear' for entry in net.init_cfg)
    before = net.backbone.layers[0].mixer.dt_proj.bias.clone()
    net.init_weights()
    assert (net.backbone.layers[0].mixer.dt_proj.bias == before).all()
    assert before.std() > 0.1
