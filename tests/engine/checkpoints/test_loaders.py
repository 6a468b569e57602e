"""Which names are marked to be read safely, and what reads them then."""

import pytest
import torch
from mmengine.runner.checkpoint import CheckpointLoader

from mmvssm.engine.checkpoints import loaders
from mmvssm.engine.checkpoints.loaders import safely


@pytest.mark.parametrize(
    ('name', 'reader'),
    [
        ('work/iter_5.pth', 'load_from_local'),
        ('/abs/iter_5.pth', 'load_from_local'),
        ('http://host/w.pth', 'load_from_http'),
        ('https://host/w.pth', 'load_from_http'),
        ('s3://bucket/w.pth', 'load_from_ceph'),
        ('cluster:s3://bucket/w.pth', 'load_from_ceph'),
        ('petrel://bucket/w.pth', 'load_from_ceph'),
    ],
)
def test_marked_names_are_read_by_this_package(name, reader, monkeypatch):
    read = {
        pattern: lambda name, device, by=loader.__name__: (by, name, device)
        for pattern, loader in loaders._LOADERS.items()
    }
    monkeypatch.setattr(loaders, '_LOADERS', read)
    marked = safely(name)
    assert safely(marked) == marked != name
    # mmengine finds the mark before its own schemes within the name.
    found = CheckpointLoader.load_checkpoint(marked, 'cpu', logger='silent')
    assert found == (reader, name, 'cpu')


@pytest.mark.parametrize(
    'name', ['openmmlab://resnet50', 'pavi://x', 'torchvision://a']
)
def test_names_of_mmengine_stay_its_own(name):
    assert safely(name) == name


def test_installing_replaces_what_mmengine_had(tmp_path, monkeypatch):
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    loaders.install_safe_loaders()
    for name in ('a.pth', 'http://host/a.pth', 's3://bucket/a.pth'):
        loader = CheckpointLoader._get_checkpoint_loader(name)
        assert loader.__module__ == loaders.__name__, name
    torch.save(dict(meta=dict(config='1 / 0', epoch=3)), tmp_path / 'a.pth')
    for name in (str(tmp_path / 'a.pth'), safely(str(tmp_path / 'a.pth'))):
        content = CheckpointLoader.load_checkpoint(name, 'cpu', logger='silent')
        assert content == dict(meta=dict(epoch=3))
