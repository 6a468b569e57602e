import pytest
from mmengine.config import Config

from mmvssm.engine import (
    UsageError,
    enable_amp,
    enable_painting,
    enable_resume,
    enable_tta,
    load_config,
)
from tiny import write_config


@pytest.fixture
def path(tmp_path):
    return str(write_config(tmp_path / 'tiny.py', tmp_path))


def test_work_dir_and_options(path):
    cfg = load_config(path, ['train_cfg.max_iters=7', 'work_dir=mine'])
    assert cfg.train_cfg.max_iters == 7
    assert cfg.work_dir == 'mine'
    assert load_config(path, work_dir='given').work_dir == 'given'
    assert load_config(path).work_dir == './work_dirs/tiny'


def test_config_of_an_installed_package():
    pytest.importorskip('mmseg')
    cfg = load_config('mmvssm::upernet_vmamba_t.py')
    assert cfg.model.backbone.arch == 't_s1l8'
    assert cfg.work_dir == './work_dirs/upernet_vmamba_t'


def test_absent_config_names_its_neighbours(path, tmp_path):
    with pytest.raises(UsageError, match=r'other\.py\. That folder has tiny'):
        load_config(str(tmp_path / 'other.py'))


def test_resuming_keeps_what_to_start_from(path):
    cfg = load_config(path, ['load_from=start.pth'])
    keys = set(cfg)
    enable_resume(cfg)
    assert cfg.resume and cfg.load_from is None
    assert cfg.default_hooks.checkpoint.start_from == 'start.pth'
    enable_resume(cfg, 'iter_5.pth')
    assert cfg.resume and cfg.load_from == 'iter_5.pth'
    # No entry that only this package knows.
    assert set(cfg) - keys <= {'resume'}


def test_resuming_without_the_hook_forgets_no_load_from(path):
    cfg = load_config(path)
    cfg.default_hooks.checkpoint.type = 'CheckpointHook'
    enable_resume(cfg)
    cfg.load_from = 'start.pth'
    with pytest.raises(UsageError, match=r'load_from=start\.pth .*SafeCheckpointHook'):
        enable_resume(cfg)


@pytest.mark.parametrize('before', ['OptimWrapper', 'AmpOptimWrapper'])
def test_bfloat16_needs_no_scale(path, before):
    cfg = load_config(path)
    cfg.optim_wrapper.update(type=before, loss_scale='dynamic')
    enable_amp(cfg)
    assert cfg.optim_wrapper.type == 'mmvssm.Bf16OptimWrapper'
    assert 'loss_scale' not in cfg.optim_wrapper


def test_float16_scales_the_loss(path, monkeypatch):
    monkeypatch.setattr('mmvssm.engine.configs.config.get_device', lambda: 'cuda')
    cfg = load_config(path)
    enable_amp(cfg, 'float16')
    wrapper = cfg.optim_wrapper
    assert (wrapper.type, wrapper.dtype, wrapper.loss_scale) == (
        'AmpOptimWrapper',
        'float16',
        'dynamic',
    )
    monkeypatch.setattr('mmvssm.engine.configs.config.get_device', lambda: 'cpu')
    with pytest.raises(UsageError, match='--amp bfloat16'):
        enable_amp(cfg, 'float16')


def test_amp_leaves_other_wrappers_alone():
    cfg = Config(dict(optim_wrapper=dict(type='ApexOptimWrapper')))
    with pytest.raises(UsageError, match='ApexOptimWrapper'):
        enable_amp(cfg)


def test_tta_and_painting_need_their_parts(path):
    cfg = load_config(path)
    enable_tta(cfg)
    assert cfg.model.type == 'SegTTAModel'
    assert cfg.model.module.type == 'EncoderDecoder'
    enable_painting(cfg, 'pictures')
    assert cfg.default_hooks.visualization.type == 'mmvssm.PaintingHook'
    assert cfg.visualizer.save_dir == 'pictures'
    cfg.default_hooks.visualization = dict(type='OwnHook')
    enable_painting(cfg, 'pictures')
    assert cfg.default_hooks.visualization.draw
    bare = Config(dict(model={}))
    with pytest.raises(UsageError, match='tta_model and tta_pipeline'):
        enable_tta(bare)
    with pytest.raises(UsageError, match='SegVisualizationHook'):
        enable_painting(bare)


@pytest.mark.parametrize('loader', [None, dict(batch_size=1)])
def test_tta_without_a_test_data_set(loader):
    cfg = Config(
        dict(model=dict(), tta_model=dict(), tta_pipeline=[], test_dataloader=loader)
    )
    with pytest.raises(UsageError, match='--tta needs a dataset in test_dataloader'):
        enable_tta(cfg)
