"""mmvssm.compat: configs of other packages, checkpoints of mmengine."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.infer import BaseInferencer
from mmengine.logging import HistoryBuffer, MessageHub

from mmvssm import compat
from tiny import REPO


def inherit(tmp_path, base):
    """A config somewhere else whose only line is its base."""
    path = tmp_path / 'config.py'
    path.write_text(f'_base_ = {base!r}\n')
    return Config.fromfile(path)


def test_flat_config_of_this_package_can_be_a_base(tmp_path):
    config = inherit(tmp_path, 'mmvssm::upernet_vmamba_t.py')
    assert config.model.backbone.type.endswith('VSSM')


def test_nested_config_of_this_package_can_be_a_base(tmp_path):
    config = inherit(tmp_path, 'mmvssm::_base_/models/upernet_vmamba.py')
    assert config.model.type.endswith('EncoderDecoder')


def test_config_of_mmseg_can_be_a_base(tmp_path):
    pytest.importorskip('mmseg')
    config = inherit(tmp_path, ['mmseg::_base_/datasets/ade20k.py'])
    assert config.dataset_type == 'ADE20KDataset'


@pytest.mark.parametrize(
    ('base', 'error'),
    [
        ('mmvssm::no_such_config.py', FileNotFoundError),
        ('mmvssm::', FileNotFoundError),
        ('elsewhere::config.py', ValueError),
    ],
)
def test_wrong_base_still_fails(tmp_path, base, error):
    with pytest.raises(error):
        inherit(tmp_path, base)


def test_name_of_a_config_of_this_package_is_enough_for_an_inferencer():
    import mmvssm.engine  # noqa: F401

    find = BaseInferencer._load_model_from_metafile
    config, weights = find(None, 'upernet_vmamba_t')
    assert config.model.backbone.arch == 't_s1l8'
    assert weights == 'mmvssm://upernet_vmamba_t'
    assert find(None, 'upernet_vim_quickstart')[1] is None


@pytest.mark.parametrize(
    'first, then', [('mmvssm', 'mmengine.infer'), ('mmengine.infer', 'mmvssm')]
)
def test_importing_the_package_is_enough_for_an_inferencer(first, then):
    script = (
        f'import {first}, sys; seen = "cv2" in sys.modules; import {then};'
        'from mmengine.infer import BaseInferencer as B; '
        'print(seen, B._load_model_from_metafile(None, "upernet_vmamba_t")[1])'
    )
    done = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, cwd=REPO
    )
    assert done.returncode == 0, done.stderr
    seen, name = done.stdout.split()[-2:]
    assert name == 'mmvssm://upernet_vmamba_t'
    # The package alone does without what inferencers import.
    assert (seen == 'True') == (first != 'mmvssm')


def test_applying_again_changes_nothing():
    # mmengine's own loader takes back what was allowed.
    compat.apply()
    compat.find_own_models(str)
    find = Config._get_cfg_path
    load = BaseInferencer._load_model_from_metafile
    scopes = dict(MODULE2PACKAGE)
    allowed = set(torch.serialization.get_safe_globals())
    compat.apply()
    compat.find_own_models(str)
    assert Config._get_cfg_path is find
    assert BaseInferencer._load_model_from_metafile is load
    assert scopes == MODULE2PACKAGE
    assert set(torch.serialization.get_safe_globals()) == allowed


@pytest.mark.parametrize('dtype', ['float64', 'float32', 'int64'])
def test_checkpoint_with_message_hub_loads_with_weights_only(tmp_path, dtype):
    hub = MessageHub('test_compat')
    hub.update_scalar('train/loss', 0.5)
    hub.update_info('best_score', np.float64(0.75))
    losses = np.arange(3, dtype=dtype)
    checkpoint = {
        'state_dict': {'weight': torch.ones(2)},
        'message_hub': hub.state_dict(),
        'history': HistoryBuffer(losses, np.ones(3, dtype='int64')),
    }
    torch.save(checkpoint, tmp_path / 'iter_7.pth')

    loaded = torch.load(tmp_path / 'iter_7.pth', weights_only=True)

    assert np.array_equal(loaded['history'].data[0], losses)
    assert loaded['message_hub']['log_scalars']['train/loss'].current() == 0.5
    assert loaded['message_hub']['runtime_info']['best_score'] == 0.75


@pytest.mark.parametrize('package', ['numpy.core', 'numpy._core'])
def test_checkpoint_written_with_another_numpy_loads(tmp_path, package):
    numpy_2 = np.lib.NumpyVersion(np.__version__) >= '2.0.0'
    ours = b'numpy._core' if numpy_2 else b'numpy.core'
    path = tmp_path / 'best.pth'
    checkpoint = {'score': np.float64(0.75), 'losses': np.ones(3)}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(ours, package.encode()))

    loaded = torch.load(path, weights_only=True)

    assert loaded['score'] == 0.75
    assert np.array_equal(loaded['losses'], np.ones(3))


def test_checkpoint_may_not_reach_other_attributes(tmp_path):
    class Reach:
        def __reduce__(self):
            return getattr, (np.ndarray, 'tofile')

    torch.save(Reach(), tmp_path / 'foreign.pth')
    with pytest.raises(pickle.UnpicklingError, match='may not be read'):
        torch.load(tmp_path / 'foreign.pth', weights_only=True)
