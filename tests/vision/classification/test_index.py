"""MMPretrain's own functions know our models by name."""

import subprocess
import sys
import warnings

import mmvssm  # isort: skip
import mmpretrain
import numpy as np
import pytest
import torch
from mmpretrain.apis.model import ModelHub
from PIL import Image

from mmvssm import zoo
from mmvssm.classification import index
from tiny import REPO


def test_importing_both_is_enough():
    """Here MMPretrain comes first; for the tests below the package does."""
    script = (
        'import mmpretrain, mmvssm; from mmpretrain import list_models;'
        'print(*list_models("vmamba_t", task="Image Classification"))'
    )
    done = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, cwd=REPO
    )
    assert done.returncode == 0, done.stderr
    names = done.stdout.splitlines()[-1].split()
    assert names == ['vmamba_t_s1l8', 'vmamba_t_s2l5', 'vmamba_t_v0']


def test_every_model_is_listed_once():
    listed = mmpretrain.list_models()
    assert {name for name in mmvssm.list_models() if 'study' not in name} < set(listed)
    assert 'resnet18_8xb32_in1k' in listed
    before = dict(ModelHub._models_dict)
    index.register_models()
    assert before == ModelHub._models_dict


@pytest.mark.parametrize('name', ['vmamba_t_s1l8', 'mambar_s', 'mlla_t'])
def test_models_by_name(name):
    net = mmpretrain.get_model(name)
    own = mmvssm.build_classifier(name)
    report = mmvssm.load_checkpoint(net, own.state_dict(), strict=True)
    assert not report.missing and not report.unexpected
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(net(images), own.eval()(images), rtol=0, atol=0)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A file of the zoo in its cache: that of the smallest model."""
    monkeypatch.setenv('MMVSSM_CACHE_DIR', str(tmp_path / 'cache'))
    own = mmvssm.build_classifier('vim_t').eval()
    state = {}
    for name, value in own.state_dict().items():
        state[name.removeprefix('backbone.').removeprefix('classifier.')] = value
    path = zoo.path_of('vim_t')
    path.parent.mkdir(parents=True)
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    torch.save(dict(model=state, model_ema=other, epoch=299), path)
    return own


def test_published_weights_by_name(published, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        net = mmpretrain.get_model('vim_t', pretrained=True)
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(net(images), published(images), rtol=0, atol=0)

    pixels = np.random.default_rng(0).integers(0, 256, (80, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'image.png')
    inferencer = mmpretrain.ImageClassificationInferencer('vim_t')
    (found,) = inferencer(str(tmp_path / 'image.png'), show_dir=str(tmp_path))
    assert found['pred_scores'].shape == (1000,)
    assert found['pred_class'] == inferencer.classes[found['pred_label']]
    assert 'goldfish, Carassius auratus' in inferencer.classes
    again = mmpretrain.inference_model(net, str(tmp_path / 'image.png'))
    np.testing.assert_array_equal(again['pred_scores'], found['pred_scores'])
