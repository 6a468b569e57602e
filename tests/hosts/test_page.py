"""docs/hosts.md: its tables name what is tested, its examples train."""

import re

import pytest
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope

import mmvssm.engine
import tiny_det
from tiny import REPO

from . import test_mmdet, test_mmseg
from .swap import FAMILIES, without_gradient

TEXT = (REPO / 'docs' / 'hosts.md').read_text()


def part(title):
    """The text under a heading, down to the next one."""
    return re.split(r'^#+ ', TEXT.partition(f'# {title}\n')[2], flags=re.M)[0]


def table(text):
    """What each config is said to take, and the notes."""
    rows = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in text.splitlines()
        if line.startswith('|') and '---' not in line
    ]
    columns = [re.findall(r'`(\w+)`', cell) for cell in rows[0][1:-1]]
    assert sorted(sum(columns, [])) == sorted(FAMILIES)
    fits, notes = {}, {}
    for name, *cells, note in rows:
        if name == rows[0][0]:
            assert cells == rows[0][1:-1]
            continue
        assert set(cells) <= {'yes', 'no'}, name
        file = name.strip('`')
        assert file not in fits
        taken = [column for column, cell in zip(columns, cells) if cell == 'yes']
        fits[file] = set(sum(taken, []))
        notes[file] = note
    return fits, notes


@pytest.mark.parametrize(
    'title, hosts',
    [
        ('Base models', test_mmseg.HOSTS),
        ('Further heads', test_mmseg.MORE_HOSTS),
        ('Boxes', test_mmdet.BOX_HOSTS),
        ('Masks of objects', test_mmdet.MASK_HOSTS),
        ('Panoptic', test_mmdet.PANOPTIC_HOSTS),
    ],
)
def test_table(title, hosts):
    fits, notes = table(part(title))
    assert fits == {host.file: set(host.fits) for host in hosts}
    for host in hosts:
        # What is needed beside the recipe, and why something does not fit.
        special = host.changes or host.maps or host.nested or host.detection
        assert notes[host.file] or not (special or host.fits != tuple(FAMILIES))


def examples():
    return re.findall(r'```python\n(_base_.*?)```', TEXT, re.S)


def test_there_are_examples():
    assert [('mmdet::' in text, 'Vim' in text) for text in examples()] == [
        (False, False),
        (True, False),
        (True, True),
    ]


@pytest.mark.parametrize('number', range(3))
def test_example(tmp_path, number):
    detection = 'mmdet::' in examples()[number]
    if detection and tiny_det.NO_DETECTION:
        pytest.skip(tiny_det.NO_DETECTION)
    path = tmp_path / 'own.py'
    path.write_text(examples()[number])
    cfg = mmvssm.engine.load_config(str(path))
    if detection:
        model = tiny_det.build(cfg)
        batch = tiny_det.batch(number=1)
    else:
        init_default_scope('mmseg')
        cfg.model.data_preprocessor.size = test_mmseg.SIZE
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
        batch = test_mmseg.batch(2)
    given = model.data_preprocessor(batch, True)
    loss, _ = model.parse_losses(model(**given, mode='loss'))
    assert loss.isfinite()
    loss.backward()
    assert not without_gradient(model)
    assert cfg.optim_wrapper.optimizer.keys() == {'type', 'lr', 'weight_decay'}
    # Weights of the new backbone.
    name = cfg.model.backbone.init_cfg.checkpoint
    assert name.removeprefix('mmvssm://') in mmvssm.list_models()
