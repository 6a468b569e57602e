"""Studies of classifiers by config, and of timm's."""

import pytest
import torch
from mmengine.config import Config

from mmvssm.analysis.studies.subjects import parse_subjects
from mmvssm.engine import UsageError
from studies import analyze, results_of
from tiny import REPO

CONFIG = REPO / 'configs/classification/vmamba_quickstart.py'
DEIT = 'timm:deit_tiny_patch16_224'


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """A tiny classifier of MMPretrain."""
    cfg = Config.fromfile(CONFIG)
    cfg.model.backbone.arch = dict(dims=8, depths=(1, 1, 1, 1))
    cfg.model.head.in_channels = 64
    path = tmp_path_factory.mktemp('configs') / 'tiny_cls.py'
    cfg.dump(path)
    return path


@pytest.mark.parametrize('study', ['norms', 'erf'])
def test_side_by_side(study, config, tmp_path, monkeypatch):
    command = [study, '--models', config, DEIT, '--size', 64, 96, '--num-images', 1]
    assert analyze(monkeypatch, *command, '--out-dir', tmp_path) == 0
    found = results_of(tmp_path, study)
    assert [x['task'] for x in found['models']] == ['classifier', 'classifier']
    assert [x['family'] for x in found['models']] == ['VMamba', None]
    assert set(found['results']) == {'tiny_cls', 'deit_tiny_patch16_224'}


@pytest.mark.parametrize(
    'study, more',
    [
        ('attention', ['--modes', 'decayed']),
        ('gates', []),
        ('cam', []),
        ('scaling', ['--peers', '--no-memory', '--seconds', 0, '--train']),
    ],
)
def test_mixers_of_this_package(study, more, config, tmp_path, monkeypatch, capsys):
    command = [study, '--models', config, '--size', 64, '--num-images', 1, *more]
    assert analyze(monkeypatch, *command, '--out-dir', tmp_path) == 0
    assert set(results_of(tmp_path, study)['results']) == {'tiny_cls'}
    if study == 'scaling':
        found = results_of(tmp_path, study)['results']['tiny_cls']
        assert None not in found['training']['images_per_second']
        command[2] = DEIT
        assert analyze(monkeypatch, *command, '--out-dir', tmp_path) == 0
    else:
        command[2] = DEIT
        assert analyze(monkeypatch, *command, '--out-dir', tmp_path) == 2
        assert 'deit_tiny_patch16_224: VisionTransformer' in capsys.readouterr().err


def test_weights_of_a_config(config, tmp_path):
    (subject,) = parse_subjects([str(config)])
    first = subject.build(seed=1).net
    torch.save(dict(state_dict=first.state_dict()), tmp_path / 'x.pth')
    (subject,) = parse_subjects([f'{config}={tmp_path / "x.pth"}'])
    again = subject.build().net.state_dict()
    assert all(torch.equal(x, again[key]) for key, x in first.state_dict().items())


def test_images_are_prepared_as_by_mmpretrain(config):
    import numpy as np
    from mmengine.registry import MODELS

    (subject,) = parse_subjects([str(config)])
    model = subject.build()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    preprocess = MODELS.build(
        {'type': 'mmpretrain.ClsDataPreprocessor', **subject.cfg.data_preprocessor}
    )
    loaded = torch.from_numpy(pixels[..., ::-1].copy()).permute(2, 0, 1)
    expected = preprocess(dict(inputs=[loaded]), False)['inputs']
    torch.testing.assert_close(model.prepare(pixels), expected)


def test_timm_has_no_such_model():
    (subject,) = parse_subjects(['timm:deit_none'])
    with pytest.raises(UsageError, match='timm has no model deit_none'):
        subject.build()


def test_weights_of_timm(tmp_path):
    (subject,) = parse_subjects([DEIT])
    first = subject.build(seed=1).net
    torch.save(first.state_dict(), tmp_path / 'x.pth')
    (subject,) = parse_subjects([f'{DEIT}={tmp_path / "x.pth"}'])
    again = subject.build().net.state_dict()
    assert all(torch.equal(x, again[key]) for key, x in first.state_dict().items())
    torch.save(dict(a=torch.zeros(2)), tmp_path / 'bad.pth')
    (subject,) = parse_subjects([f'{DEIT}={tmp_path / "bad.pth"}'])
    with pytest.raises(UsageError, match='bad.pth does not fit'):
        subject.build()
