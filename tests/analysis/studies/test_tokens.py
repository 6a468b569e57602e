import numpy as np
import pytest
from PIL import Image

from studies import analyze, results_of, write_segmentor

pytest.importorskip('mmseg')


def write_set(folder, number, seed):
    """Two classes that any features tell apart."""
    rng = np.random.default_rng(seed)
    for name, level in (('dark', 20), ('light', 200)):
        (folder / name).mkdir(parents=True)
        for i in range(number):
            pixels = rng.integers(level, level + 40, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f'{i}.png')


@pytest.mark.parametrize('beside', [True, False])
def test_class_folders(beside, tmp_path, monkeypatch):
    """One of four is held out, or the folder beside is the test set."""
    write_set(tmp_path / 'set/train', 8, 0)
    if beside:
        write_set(tmp_path / 'set/val', 3, 1)
    config = write_segmentor(tmp_path, 'mlla')
    command = ['tokens', '--models', config, '--data', tmp_path / 'set/train']
    command += ['--size', 32, '--batch-size', 5, '--out-dir', tmp_path]
    assert analyze(monkeypatch, *command) == 0
    results = results_of(tmp_path, 'tokens')['results']
    found = results['mlla']
    counts = found['classes'], found['train_images'], found['test_images']
    assert counts == ((2, 16, 6) if beside else (2, 12, 4))
    names = {'top_5', 'top_10', 'top_20', 'rest_80', 'all'}
    assert set(found['accuracy']) == set(results['article']['accuracy']) == names
    assert found['accuracy']['all'] == 100


def test_another_test_set(tmp_path, monkeypatch, capsys):
    write_set(tmp_path / 'a', 2, 0)
    write_set(tmp_path / 'b', 2, 1)
    (tmp_path / 'b/dark').rename(tmp_path / 'b/grey')
    config = write_segmentor(tmp_path, 'mlla')
    command = ['tokens', '--models', config, '--data', tmp_path / 'a', '--size', 32]
    command += ['--test-data', tmp_path / 'b', '--out-dir', tmp_path]
    assert analyze(monkeypatch, *command) == 2
    assert 'has other class folders than' in capsys.readouterr().err
