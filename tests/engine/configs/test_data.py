import json
import shutil

import pytest
from mmengine.config import Config

from mmvssm.engine import UsageError, check_datasets
from tiny import write_ade, write_config


@pytest.fixture
def ade(tmp_path):
    return write_ade(tmp_path / 'ade', 1, 1)


def test_found(ade, tmp_path):
    cfg = Config.fromfile(write_config(tmp_path / 'tiny.py', ade))
    check_datasets(cfg, ('train', 'val', 'test'))


@pytest.mark.parametrize('gone', ['images/training', 'annotations/validation'])
@pytest.mark.parametrize('emptied', [False, True])
def test_only_what_is_absent_is_named(gone, emptied, ade, tmp_path):
    cfg = Config.fromfile(write_config(tmp_path / 'tiny.py', ade))
    shutil.rmtree(ade / gone)
    if emptied:
        (ade / gone).mkdir()
    with pytest.raises(UsageError) as error:
        check_datasets(cfg)
    said = str(error.value)
    assert str(ade / gone) in said and 'ADE20K_ROOT' in said
    assert str(ade / 'images/validation') not in said


def test_splits_that_are_not_read_are_not_needed(ade, tmp_path):
    cfg = Config.fromfile(write_config(tmp_path / 'tiny.py', ade))
    shutil.rmtree(ade / 'images/training')
    check_datasets(cfg, ('test',))


def test_inside_wrappers_and_lists(tmp_path):
    leaf = dict(
        type='Any',
        data_root=str(tmp_path),
        ann_file='train.txt',
        data_prefix=dict(img_path=''),
    )
    wrapped = dict(
        type='RepeatDataset', dataset=dict(type='ConcatDataset', datasets=[leaf])
    )
    cfg = Config(dict(train_dataloader=dict(dataset=wrapped)))
    with pytest.raises(UsageError, match=r'train\.txt') as error:
        check_datasets(cfg)
    assert 'ADE20K' not in str(error.value)
    (tmp_path / 'train.txt').write_text('a')
    check_datasets(cfg)


def test_remote_data_is_not_looked_for():
    leaf = dict(data_root='s3://bucket/ade', data_prefix=dict(img_path='a'))
    check_datasets(Config(dict(train_dataloader=dict(dataset=leaf))))


# ------------------------------------------------------------------------- COCO
@pytest.fixture
def coco(tmp_path):
    """A data set of two images with two categories, and its config."""
    (tmp_path / 'train').mkdir()
    (tmp_path / 'train/1.jpg').write_bytes(b'')
    content = dict(
        images=[dict(id=1, file_name='1.jpg')],
        annotations=[dict(id=1, caption='"categories": [')],
        categories=[dict(id=3, name='dog'), dict(id=7, name='cat')],
    )
    (tmp_path / 'train.json').write_text(json.dumps(content))
    dataset = dict(
        type='CocoDataset',
        data_root=str(tmp_path),
        ann_file='train.json',
        data_prefix=dict(img='train'),
        metainfo=dict(classes=('dog', 'cat')),
    )
    return Config(dict(train_dataloader=dict(dataset=dataset)))


@pytest.mark.parametrize('classes', [('dog', 'cat'), ('dog',), ('cat',), 'cat'])
def test_categories_that_are_not_trained_may_be_there(coco, classes):
    coco.train_dataloader.dataset.metainfo.classes = classes
    check_datasets(coco)


@pytest.mark.parametrize('classes', [('cat', 'dog'), ('dog', 'cow'), ('cow',)])
def test_unknown_or_reordered_categories_are_refused(coco, classes):
    coco.train_dataloader.dataset.metainfo.classes = classes
    with pytest.raises(UsageError) as error:
        check_datasets(coco)
    said = str(error.value)
    assert 'train.json' in said and 'has dog, cat' in said and 'metainfo' in said


@pytest.mark.parametrize('change', ['cut', 'cut elsewhere', 'empty', 'list', 'other'])
def test_damaged_annotations_are_refused_by_name(coco, change, tmp_path):
    path = tmp_path / 'train.json'
    whole = path.read_text()
    first = '{"categories": [{"name": "dog"}, {"name": "cat"}], "images": ['
    path.write_text(
        {
            'cut': whole[:-30],
            'cut elsewhere': first,
            'empty': '',
            'list': '[1, 2]',
            'other': '{"categories": 3}',
        }[change]
    )
    with pytest.raises(UsageError, match=r'train\.json is no annotation file of COCO'):
        check_datasets(coco)


def test_what_is_scored_against_is_needed(coco, tmp_path):
    coco.val_evaluator = dict(type='CocoMetric', ann_file=str(tmp_path / 'val.json'))
    with pytest.raises(UsageError, match=r'val\.json'):
        check_datasets(coco)
    check_datasets(coco, ('train',))


def test_absent_coco_says_how_it_is_laid_out(coco, tmp_path):
    shutil.rmtree(tmp_path / 'train')
    with pytest.raises(UsageError) as error:
        check_datasets(coco)
    said = str(error.value)
    assert 'COCO_ROOT' in said and 'ADE20K_ROOT' not in said
