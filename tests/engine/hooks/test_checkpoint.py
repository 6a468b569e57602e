import pytest
import torch

from mmvssm import engine
from tiny import write_ade, write_config

pytest.importorskip('mmseg')


def test_what_to_start_from_must_have_the_backbone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path / 'tiny.py', write_ade(tmp_path / 'ade'))
    torch.save({'backbone.norm.weight': torch.ones(3)}, 'other.pth')
    cfg = engine.load_config(str(path), ['load_from=other.pth'])
    engine.enable_resume(cfg)
    with pytest.raises(engine.UsageError, match='does not have this backbone'):
        engine.build_runner(cfg).train()
