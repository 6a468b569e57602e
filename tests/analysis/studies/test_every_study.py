"""Each study on a config of each family."""

import re

import numpy as np
import pytest
from PIL import Image

from mmvssm.analysis.studies import STUDIES
from studies import SEGMENTORS, analyze, results_of, write_detector, write_segmentor
from tiny import REPO
from tiny_det import needs_detection

pytest.importorskip('mmseg')

# What a study needs besides.
MORE = {
    'tokens': ('--num-images', 28),
    # With other random weights a map may be zero everywhere.
    'cam': ('--seed', 1),
    'scaling': ('--peers', '--no-memory', '--seconds', 0, '--threads', 1),
}
# To be quick with several models.
FEWER = {'norms': ('--layers', 0), 'attention': ('--modes', 'decayed')}
# Those that run more of a model than its backbone, which may want to know the padding.
MASKED = ('cam', 'scaling')
# Of which models a study can be made; of all, where nothing is said.
ONLY = {'registers': ('mambar',)}


@pytest.fixture(scope='module')
def configs(tmp_path_factory):
    """Tiny segmentors, by family."""
    folder = tmp_path_factory.mktemp('configs')
    return {family: write_segmentor(folder, family) for family in SEGMENTORS}


def check(out, study, labels):
    """Pictures that are no blank sheets, and a JSON file that says what was done."""
    found = results_of(out, study)
    assert found['study'] == study
    assert [model['label'] for model in found['models']] == labels
    assert set(labels) <= set(found['results'])
    pictures = sorted(out.glob(f'{study}*.png'))
    assert pictures
    for path in pictures:
        with Image.open(path) as picture:
            assert np.asarray(picture.convert('L')).std() > 1, path
    written = set(keys_of([found['results'][label] for label in labels]))
    assert not written - documented(study), 'docs/studies.md has no such keys'
    return found


def keys_of(part):
    """Keys of all dicts in it, but for names of blocks and sizes."""
    if isinstance(part, dict):
        yield from (key for key in part if key.isidentifier())
        part = list(part.values())
    if isinstance(part, list):
        for value in part:
            yield from keys_of(value)


def documented(study):
    """What is marked as code in the study's section."""
    page = (REPO / 'docs/studies.md').read_text()
    section = page.partition(f'(`{study}`)\n')[2].partition('\n## ')[0]
    return set(re.findall(r'`([^`]+)`', re.sub(r'```.*?```', '', section, flags=re.S)))


@pytest.mark.parametrize('study', STUDIES)
def test_families_side_by_side(study, configs, tmp_path, monkeypatch):
    families = ONLY.get(study, tuple(configs))
    command = [study, '--models', *(configs[name] for name in families)]
    command += ['--size', 64, 96, '--num-images', 1, '--out-dir', tmp_path]
    command += [*MORE.get(study, ()), *FEWER.get(study, ())]
    assert analyze(monkeypatch, *command) == 0
    check(tmp_path, study, list(families))


def test_classifiers_by_name(tmp_path, monkeypatch):
    command = ['registers', '--models', 'vim_t', 'mambar_t', '--size', 32, 48]
    command += ['--num-images', 1, '--out-dir', tmp_path]
    assert analyze(monkeypatch, *command) == 0
    found = check(tmp_path, 'registers', ['vim_t', 'mambar_t'])
    assert [x['registers'] for x in found['results'].values()] == [1, 12]
    assert [x['task'] for x in found['models']] == ['classifier', 'classifier']


@needs_detection
@pytest.mark.parametrize('study', [name for name in STUDIES if name not in ONLY])
def test_detector(study, tmp_path, monkeypatch):
    path = write_detector(tmp_path)
    command = [study, '--models', path, '--size', 64, '--num-images', 1]
    command += ['--out-dir', tmp_path, *MORE.get(study, ())]
    if study in MASKED:
        command += ['--cfg-options', 'model.backbone.mask_padding=True']
    assert analyze(monkeypatch, *command) == 0
    check(tmp_path, study, ['detector'])
