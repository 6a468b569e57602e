"""The quickstart, from nothing to its pictures, at a very small size."""

import json
import os

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

import warm
from mmvssm.datasets import QUICKSTART_CLASSES, QUICKSTART_PALETTE
from tiny import REPO
from tiny_det import needs_detection

pytest.importorskip('skimage')
CONFIG = REPO / 'configs/upernet_vmamba_quickstart.py'
DETECTOR = REPO / 'configs/mask_rcnn_vmamba_quickstart.py'
FOUR_BANDS = REPO / 'configs/upernet_vmamba_four_bands_quickstart.py'
SMALL = [
    'generator.num_train=4',
    'generator.num_val=2',
    'generator.size=64',
    'default_hooks.checkpoint.interval=2',
    'train_dataloader.batch_size=2',
    # Its warm-up ends before a training of two iterations does.
    'param_scheduler.0.end=1',
    'param_scheduler.1.begin=1',
]


def quickstart(folder, *options, iterations=2, arguments=('--work-dir', 'work')):
    environment = dict(
        os.environ,
        MMVSSM_QUICKSTART_ROOT=str(folder / 'data'),
        MMVSSM_QUICKSTART_COCO_ROOT=str(folder / 'data'),
        MMVSSM_QUICKSTART_FOUR_BANDS_ROOT=str(folder / 'four_bands'),
    )
    if iterations:
        arguments = (*arguments, '--iterations', str(iterations))
    command = [REPO / 'tools/quickstart.py', *arguments, '--cfg-options']
    return warm.run([*command, *SMALL, *options], cwd=folder, env=environment)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    pytest.importorskip('mmseg')
    folder = tmp_path_factory.mktemp('quickstart')
    done = quickstart(folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture(scope='module')
def detected(tmp_path_factory):
    folder = tmp_path_factory.mktemp('quickstart_det')
    done = quickstart(folder, arguments=('--config', DETECTOR, '--work-dir', 'work'))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_writes_what_it_says(finished):
    folder, said = finished
    work = folder / 'work'
    assert 0 <= json.loads((work / 'metrics.json').read_text())['mIoU'] <= 100
    sheet = Image.open(work / 'contact_sheet.png')
    assert min(sheet.size) > 100 and len(sheet.convert('RGB').getcolors(2**24)) > 50
    for name in ('metrics.json', 'contact_sheet.png', 'iter_2.pth'):
        assert f'work/{name}' in said
        assert (work / name).stat().st_size > 0
    assert 'on 2 held-out images' in said
    assert 'This training starts from random weights' in said


@needs_detection
def test_detector_writes_what_it_says(detected):
    folder, said = detected
    work = folder / 'work'
    metrics = json.loads((work / 'metrics.json').read_text())
    assert {'coco/bbox_mAP_50', 'coco/segm_mAP_50'} <= set(metrics)
    assert min(Image.open(work / 'contact_sheet.png').size) > 100
    assert 'box AP50' in said and 'mask AP50' in said
    assert 'on 2 held-out images' in said and 'work/iter_2.pth' in said


@needs_detection
def test_next_step_of_the_detector_works(detected):
    test_its_next_step_works(detected)


def test_its_next_step_works(finished):
    folder, said = finished
    words = said[said.index('tools/infer.py') :].replace('\\\n', ' ').split()
    command = words[: words.index('--out-dir') + 2]
    done = warm.run([REPO / command[0], *command[1:]], cwd=folder)
    assert done.returncode == 0, done.stderr
    assert list((folder / command[-1]).rglob('*.png'))


def test_four_bands(finished, monkeypatch):
    """From the weights for three; then all tools, on TIFF files."""
    folder, _ = finished
    monkeypatch.setenv('MMVSSM_QUICKSTART_FOUR_BANDS_ROOT', str(folder / 'four_bands'))
    done = quickstart(
        folder,
        'model.backbone.init_cfg.type=Pretrained',
        f'model.backbone.init_cfg.checkpoint={folder}/work/iter_2.pth',
        arguments=('--config', FOUR_BANDS, '--work-dir', 'four'),
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert 'was repeated from 3 image channels to 4, and rescaled' in said
    assert min(Image.open(folder / 'four/contact_sheet.png').size) > 100

    def run(tool, *arguments, code=0):
        done = warm.run([REPO / 'tools' / tool, *arguments], cwd=folder)
        assert done.returncode == code, done.stderr
        return done.stdout

    checkpoint = folder / 'four/iter_2.pth'
    # Two images do not have all classes.
    sheet = ('--images', 2, '--sheet', 'four/labels.png')
    assert 'channels  4 (2)' in run('check_data.py', FOUR_BANDS, *sheet, code=1)
    assert Image.open(folder / 'four/labels_train.png').format == 'PNG'
    said = run(
        *('test.py', FOUR_BANDS, checkpoint, '--work-dir', 'four/tested'),
        *('--out', 'four/maps', '--show-dir', 'four/shown'),
    )
    pictures = list(folder.glob('four/shown/**/*.png'))
    assert len(pictures) == 2 and 'mIoU' in said
    images = 'four_bands/images/validation'
    said = run(
        *('infer.py', images, 'data/images/validation', '--config', FOUR_BANDS),
        *('--checkpoint', checkpoint, '--out-dir', 'four/seen'),
        code=1,
    )
    assert '2 of 4 images segmented' in said and said.count('not a TIFF file') == 2
    for path in (folder / images).iterdir():
        tested = np.asarray(Image.open(folder / f'four/maps/{path.stem}.png'))
        seen = np.asarray(Image.open(folder / f'four/seen/{path.stem}_labels.png'))
        # Files of the test are numbered as ADE20K is, from 1.
        np.testing.assert_array_equal(seen + 1, tested)
    assert 'FLOPs' in run('get_flops.py', FOUR_BANDS, '--shape', 64)


def test_again_goes_on_from_what_is_there(finished):
    folder, _ = finished
    done = quickstart(folder, iterations=3)
    assert done.returncode == 0, done.stderr
    assert 'resumed epoch: 0, iter: 2' in done.stdout + done.stderr
    assert (folder / 'work/iter_3.pth').exists()


def test_chooses_among_its_schedules_and_keeps_to_that(tmp_path):
    pytest.importorskip('mmseg')
    choices = ('schedules=[2,3,4]', 'train_cfg.max_iters=4', 'param_scheduler.1.end=4')
    slow = quickstart(tmp_path, *choices, 'training_seconds=1e-9', iterations=None)
    assert slow.returncode == 0, slow.stderr
    assert 'The training has 2 iterations' in slow.stdout
    work = tmp_path / 'work'
    assert (work / 'iter_2.pth').exists()
    # A training of 3 would have other learning rates from the start.
    again = quickstart(tmp_path, *choices, 'training_seconds=1e9', iterations=None)
    assert again.returncode == 0, again.stderr
    assert 'iterations' not in again.stdout.split('mIoU')[0].rpartition('\n\n')[2]
    assert not (work / 'iter_4.pth').exists()

    fast = ('--work-dir', 'fast')
    done = quickstart(
        tmp_path, *choices, 'training_seconds=1e9', iterations=None, arguments=fast
    )
    assert done.returncode == 0, done.stderr
    assert 'The training has 4 iterations' in done.stdout
    cfg = Config.fromfile(tmp_path / 'fast' / CONFIG.name)
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[1].end == 4


def test_a_folder_of_other_settings_is_kept(finished):
    folder, _ = finished
    done = quickstart(folder, 'generator.seed=1')
    assert done.returncode == 2
    assert 'error: ' in done.stderr and 'Traceback' not in done.stderr


def test_another_config_has_a_work_dir_of_its_own(finished):
    folder, _ = finished
    config = REPO / 'configs/upernet_mambar_quickstart.py'
    done = quickstart(folder, arguments=('--config', config))
    assert done.returncode == 0, done.stderr
    for name in ('metrics.json', 'contact_sheet.png', 'iter_2.pth'):
        assert (folder / 'work_dirs/upernet_mambar_quickstart' / name).exists()


def test_config_with_other_data_is_refused(tmp_path):
    config = REPO / 'configs/upernet_vim_t.py'
    done = warm.run([REPO / 'tools/quickstart.py', '--config', config], cwd=tmp_path)
    assert done.returncode == 2
    assert 'configs/*_quickstart.py' in done.stderr and 'Traceback' not in done.stderr


def test_weights_that_are_not_there(tmp_path):
    """Said before any data is made."""
    command = [REPO / 'tools/quickstart.py', '--pretrained', 'none.pth']
    done = warm.run(command, cwd=tmp_path)
    assert done.returncode == 2 and 'no checkpoint at' in done.stderr
    assert not list(tmp_path.iterdir())


def test_config_knows_the_classes():
    metainfo = Config.fromfile(CONFIG).metainfo
    assert tuple(metainfo.classes) == QUICKSTART_CLASSES
    assert [list(c) for c in metainfo.palette] == [list(c) for c in QUICKSTART_PALETTE]
