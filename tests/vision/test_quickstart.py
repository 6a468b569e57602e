"""The quickstart of classification, and the path from its checkpoint to a segmentor."""

import json
import os

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

import warm
from mmvssm.datasets import make_quickstart_dataset
from mmvssm.datasets.layouts import ImageNetLayout
from tiny import REPO

CONFIG = REPO / 'configs/classification/vmamba_quickstart.py'
SEGMENTOR = REPO / 'configs/upernet_vmamba_quickstart.py'


def run(folder, tool, *arguments):
    environment = dict(
        os.environ,
        MMVSSM_QUICKSTART_ROOT=str(folder / 'data_seg'),
        MMVSSM_QUICKSTART_CLS_ROOT=str(folder / 'data'),
    )
    done = warm.run([REPO / tool, *arguments], cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def quickstart(folder, *arguments, options=()):
    return run(
        *(folder, 'tools/quickstart.py', *arguments),
        *('--cfg-options', 'generator.size=64', 'train_dataloader.batch_size=2'),
        *('generator.num_train=14', 'generator.num_val=7'),
        *('param_scheduler.0.end=1', 'param_scheduler.1.begin=1', *options),
    )


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """Of 2 or 3 iterations, those that a slow machine does."""
    folder = tmp_path_factory.mktemp('quickstart_cls')
    options = ('schedules=[2,3]', 'training_seconds=1e-9')
    options += ('train_cfg.max_iters=3', 'param_scheduler.1.end=3')
    where = ('--config', CONFIG, '--work-dir', 'work')
    return folder, quickstart(folder, *where, options=options)


def test_writes_what_it_says(finished):
    folder, said = finished
    work = folder / 'work'
    metrics = json.loads((work / 'metrics.json').read_text())
    counts = np.array(metrics['confusion_matrix/result'])
    assert counts.shape == (7, 7) and (counts.sum(1) == 1).all()
    assert np.isclose(metrics['accuracy/top1'], 100 * np.trace(counts) / 7, atol=1e-3)
    recalls = metrics['single-label/recall_classwise']
    np.testing.assert_allclose(recalls, 100 * np.diag(counts))
    for name in ('contact_sheet.png', 'confusion.png'):
        assert min(Image.open(work / name).size) > 100
    for name in ('metrics.json', 'contact_sheet.png', 'confusion.png', 'iter_2.pth'):
        assert f'work/{name}' in said
    assert 'The training has 2 iterations' in said
    assert f'top-1 accuracy {metrics["accuracy/top1"]:.1f} % on 7 held-out' in said


def test_its_next_steps_work(finished):
    """Pictures of one's own; then a segmentor, from the checkpoint as it is."""
    folder, said = finished
    lines = said[said.index('Next:') :].replace('\\\n', ' ').splitlines()
    classify, segment = (
        next(line for line in lines if f'tools/{tool}.py' in line).split()[2:]
        for tool in ('infer', 'quickstart')
    )
    run(folder, 'tools/infer.py', *classify)
    assert list((folder / classify[-1]).iterdir())
    said = quickstart(folder, *segment, '--iterations', 2)
    assert 'This training starts from work/iter_2.pth' in said
    # All of the backbone: its output norms are a segmentor's alone.
    assert 'loaded 128 of 136 tensors of the model from a VMamba classifier' in said
    assert 'only in the file, not used: classifier.* (4)' in said
    assert (folder / 'work_dirs/quickstart_pretrained/metrics.json').is_file()
    again = quickstart(folder, *segment, '--iterations', 2)
    assert 'goes on from the latest, and work/iter_2.pth is not read again' in again


def test_segmentor_has_the_backbone_of_the_classifier():
    classifier, segmentor = (
        Config.fromfile(path).model.backbone for path in (CONFIG, SEGMENTOR)
    )
    assert classifier.arch == segmentor.arch
    means = [
        Config.fromfile(path).data_preprocessor.mean for path in (CONFIG, SEGMENTOR)
    ]
    assert means[0] == means[1]


def test_config_knows_the_classes(tmp_path):
    from mmengine.registry import DefaultScope
    from mmpretrain.registry import DATASETS

    cfg = Config.fromfile(CONFIG)
    assert tuple(cfg.metainfo.classes) == ImageNetLayout.classes
    assert [tuple(c) for c in cfg.metainfo.palette] == [
        tuple(colour) for colour in ImageNetLayout.palette
    ]
    assert cfg.model.head.num_classes == cfg.data_preprocessor.num_classes == 7
    root = make_quickstart_dataset(tmp_path / 'data', 7, 7, 64, layout='imagenet')
    settings = dict(cfg.val_dataloader.dataset, data_root=str(root))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        dataset = DATASETS.build(settings)
    assert len(dataset) == 7
    for index, name in enumerate(ImageNetLayout.classes):
        sample = dataset[index]['data_samples']
        assert int(sample.gt_label) == index
        assert name.replace(' ', '_') in sample.img_path
