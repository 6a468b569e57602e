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
