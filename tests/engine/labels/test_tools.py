"""tools/check_data.py, and what tools/train.py says of labels."""

import json
import os

import numpy as np
import pytest
from PIL import Image

import warm
from tiny import REPO, write_ade, write_config
from toy import free_port

pytest.importorskip('mmseg')

TWO_CLASSES = """
two = dict(
    type='BaseSegDataset',
    reduce_zero_label=False,
    metainfo=dict(classes=('ground', 'thing'), palette=[[90, 60, 30], [0, 160, 255]]))
train_dataloader['dataset'].update(two)
val_dataloader['dataset'].update(two)
test_dataloader = val_dataloader
model['decode_head'].update(num_classes=2)
model['auxiliary_head'].update(num_classes=2)
train_cfg.update(val_interval=2)
"""


def run(tool, *args, cwd, code, **env):
    env = {k: v for k, v in os.environ.items() if k != 'MMVSSM_DATA_CHECK'} | env
    done = warm.run(
        [REPO / 'tools' / tool, *args], cwd=cwd, env=env | dict(OMP_NUM_THREADS='1')
    )
    assert done.returncode == code, (done.stdout + done.stderr)[-3000:]
    return done


@pytest.fixture
def work(tmp_path):
    write_ade(tmp_path / 'ade', 4, 2)
    write_config(tmp_path / 'tiny.py', tmp_path / 'ade', TWO_CLASSES)
    return paint(tmp_path, 0, 1)


def paint(work, *numbers):
    for path in work.glob('ade/annotations/*/*.png'):
        columns = np.resize(np.uint8(numbers), 8).repeat(10)
        Image.fromarray(np.tile(columns, (64, 1))).save(path)
    return work


def test_clean_data(work):
    done = run('check_data.py', 'tiny.py', '--json', 'a/b.json', cwd=work, code=0)
    assert 'nothing found' in done.stdout and '50.00% of the pixels' in done.stdout
    train, val = json.loads((work / 'a/b.json').read_text())
    assert train['read'] == 4 and val['split'] == 'val+test'
    assert train['classes']['thing'] == {'of the pixels': 0.5, 'images': 4}


def test_findings(work):
    paint(work, 0, 255)
    done = run(
        *('check_data.py', 'tiny.py', '--sheet', 'out/sheet.png', '--images', '3'),
        cwd=work,
        code=1,
    )
    assert '2 findings' in done.stdout and '1 in place of 255' in done.stdout
    for split in ('train', 'val_test'):
        assert Image.open(work / f'out/sheet_{split}.png').format == 'PNG'


@pytest.mark.parametrize(
    'options', [['nowhere.py'], ['tiny.py', '--images', '0'], ['tiny.py', 'gone']]
)
def test_it_cannot_run(work, options):
    if options[-1] == 'gone':
        (work / 'ade').rename(work / 'elsewhere')
        options = options[:1]
    done = run('check_data.py', *options, cwd=work, code=2)
    assert 'error: ' in done.stderr


def test_no_training_on_wrong_labels(work):
    paint(work, 0, 255)
    done = run('train.py', 'tiny.py', cwd=work, code=2)
    (message,) = done.stderr.partition('error: ')[2].strip().splitlines()
    assert '1 in place of 255' in message and 'annotations/training' in message
    done = run('train.py', 'tiny.py', cwd=work, code=0, MMVSSM_DATA_CHECK='0')
    # What such a training ends in is called what it is, beside its mIoU.
    (*_, line) = (x for x in done.stdout.splitlines() if 'Iter(val) [2/2]' in x)
    assert 'mIoU: ' in line and 'nan_classes: ' in line


def test_two_processes_are_refused_once(work):
    paint(work, 0, 1, 9)
    done = warm.run(
        [
            *('-m', 'torch.distributed.run', '--nproc_per_node=2'),
            *(f'--master_port={free_port()}', REPO / 'tools/train.py'),
            *('tiny.py', '--launcher', 'pytorch'),
        ],
        cwd=work,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(REPO)},
        timeout=240,
        merge=True,
    )
    assert done.returncode
    assert done.stdout.count('error: ') - done.stdout.count('_error: ') == 1
    assert 'label 9' in done.stdout
    # torchrun ends the other rank, if it has not ended itself yet.
    assert 'exitcode  : 2' in done.stdout
