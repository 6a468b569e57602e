"""The quickstart data set in COCO's layout: its files and their reader."""

import builtins
import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('skimage')
pytest.importorskip('pycocotools')

from mmengine.config import Config
from pycocotools import mask as mask_utils

import warm
from mmvssm.datasets import make_quickstart_dataset
from mmvssm.datasets.layouts import OBJECT_NAMES, OBJECT_PALETTE, CocoLayout
from tiny import REPO
from tiny_det import needs_detection

COUNTS = {'train2017': 64, 'val2017': 32}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'quickstart_coco'
    return make_quickstart_dataset(folder, *COUNTS.values(), seed=3, layout='coco')


def read(root, folder):
    return json.loads((root / f'annotations/instances_{folder}.json').read_text())


def test_files_are_what_the_annotations_say(root):
    for folder, count in COUNTS.items():
        content = read(root, folder)
        names = {path.name for path in (root / folder).iterdir()}
        assert names == {image['file_name'] for image in content['images']}
        assert len(names) == count
        for image in content['images']:
            size = Image.open(root / folder / image['file_name']).size
            assert size == (image['width'], image['height'])
        for key in ('images', 'annotations'):
            numbers = [entry['id'] for entry in content[key]]
            assert len(set(numbers)) == len(numbers)
    assert {path.name for path in root.parent.iterdir()} == {root.name}


def test_boxes_areas_and_masks_agree(root):
    content = read(root, 'train2017')
    sizes = {image['id']: image for image in content['images']}
    for entry in content['annotations']:
        mask = mask_utils.decode(entry['segmentation'])
        image = sizes[entry['image_id']]
        assert mask.shape == (image['height'], image['width'])
        assert entry['area'] == mask.sum() > 0
        rows, columns = np.nonzero(mask)
        left, top = columns.min(), rows.min()
        assert entry['bbox'] == [
            left,
            top,
            columns.max() + 1 - left,
            rows.max() + 1 - top,
        ]


def test_objects_of_all_kinds_are_there(root):
    content = read(root, 'train2017')
    entries = content['annotations']
    assert {entry['category_id'] for entry in entries} == set(range(1, 8))
    assert [category['name'] for category in content['categories']] == list(
        OBJECT_NAMES
    )
    crowds = [entry for entry in entries if entry['iscrowd']]
    areas = [entry['area'] for entry in entries if not entry['iscrowd']]
    assert 2 <= len(crowds) < 0.1 * len(entries)
    assert min(areas) < 16**2 < 32**2 < max(areas)
    per_image = [0] * (len(content['images']) + 1)
    for entry in entries:
        per_image[entry['image_id']] += 1
    assert per_image[1:].count(0) == 64 // CocoLayout.empty_every
    assert max(per_image) >= 4


def test_no_two_masks_of_an_image_overlap(root):
    """Every pixel belongs to the object that is seen there."""
    content = read(root, 'val2017')
    for image in content['images']:
        masks = [
            mask_utils.decode(entry['segmentation'])
            for entry in content['annotations']
            if entry['image_id'] == image['id']
        ]
        assert not masks or np.sum(masks, axis=0).max() <= 1


def test_same_settings_same_bytes(tmp_path):
    def files(name, **settings):
        made = make_quickstart_dataset(
            tmp_path / name, 4, 2, 64, layout='coco', **settings
        )
        return {
            str(path.relative_to(made)): path.read_bytes()
            for path in made.rglob('*')
            if path.is_file()
        }

    first = files('a', seed=5)
    assert first == files('b', seed=5)
    other = files('c', seed=6)
    assert all(first[name] != other[name] for name in first)


def test_damaged_data_is_made_again_and_other_data_kept(tmp_path):
    root = make_quickstart_dataset(tmp_path / 'data', 2, 1, 64, layout='coco')
    path = root / 'annotations/instances_val2017.json'
    before = path.read_bytes()
    path.unlink()
    make_quickstart_dataset(root, 2, 1, 64, layout='coco')
    assert path.read_bytes() == before
    with pytest.raises(FileExistsError, match='not made by this generator'):
        make_quickstart_dataset(root, 2, 1, 64, overwrite=True)
    assert path.read_bytes() == before


def test_without_pycocotools(tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith('pycocotools'):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(ImportError, match='pip install pycocotools'):
        make_quickstart_dataset(tmp_path / 'data', 1, 1, 64, layout='coco')
    assert not list(tmp_path.iterdir())


def test_unknown_layout(tmp_path):
    with pytest.raises(ValueError, match="layout must be one of .* got 'voc'"):
        make_quickstart_dataset(tmp_path / 'data', 1, 1, layout='voc')


def test_config_knows_the_classes():
    cfg = Config.fromfile(REPO / 'configs/_base_/datasets/quickstart_coco.py')
    assert tuple(cfg.metainfo.classes) == OBJECT_NAMES
    assert [list(colour) for colour in cfg.metainfo.palette] == list(OBJECT_PALETTE)


@needs_detection
def test_mmdet_reads_and_scores_it(root):
    """The truth itself, taken as a prediction, is perfect."""
    import torch
    from mmdet.registry import DATASETS, METRICS
    from mmdet.utils import register_all_modules
    from mmengine.structures import InstanceData

    register_all_modules(init_default_scope=True)
    cfg = Config.fromfile(REPO / 'configs/_base_/datasets/quickstart_coco.py')
    loader = cfg.val_dataloader.dataset
    dataset = DATASETS.build(dict(loader, data_root=str(root)))
    assert len(dataset) == COUNTS['val2017']
    training = dict(cfg.train_dataloader.dataset, data_root=str(root))
    assert len(DATASETS.build(training)) == 60, 'those without objects are left out'
    truth = root / 'annotations/instances_val2017.json'
    metric = METRICS.build(dict(cfg.val_evaluator, ann_file=str(truth)))
    metric.dataset_meta = dataset.metainfo
    for i in range(len(dataset)):
        sample = dataset[i]['data_samples']
        found = sample.gt_instances
        sample.pred_instances = InstanceData(
            bboxes=found.bboxes.tensor,
            labels=found.labels,
            scores=torch.ones(len(found)),
            masks=torch.from_numpy(found.masks.masks).bool(),
        )
        metric.process({}, [dict(sample.to_dict(), **sample.metainfo)])
    scores = metric.evaluate(len(dataset))
    assert scores['coco/bbox_mAP'] == scores['coco/segm_mAP'] == 1


def test_tool(tmp_path):
    sizes = ['--num-train', '2', '--num-val', '1', '--size', '64']
    made = warm.run(
        [REPO / 'tools/make_quickstart_data.py', '--layout', 'coco', *sizes],
        cwd=tmp_path,
    )
    assert made.returncode == 0, made.stderr
    assert 'of 7 classes are in data/quickstart_coco' in made.stdout
    assert (tmp_path / 'data/quickstart_coco/train2017/000000000001.jpg').is_file()
