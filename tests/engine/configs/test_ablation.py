"""The rows of an ablation on a data set small enough for a test."""

import json

import pytest
from mmengine.runner import Runner

pytest.importorskip('mmseg')

from ablation_data import write_data_config
from mmvssm.engine import UsageError
from mmvssm.engine.configs import ablation
from tiny import REPO

ROWS = REPO / 'configs' / 'ablation'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return str(write_data_config(tmp_path_factory.mktemp('ablation')))


def row(name):
    return ablation.Row(name, name, ROWS / f'{name}.py', None)


def test_rows_come_in_the_order_of_the_table():
    rows = ablation.load_rows(ROWS)
    assert rows[0].name == 'baseline' and rows[0].paper.top1 == '77.6'
    assert len(rows) == len(list(ROWS.glob('*.py')))
    some = ablation.select_rows(rows, ['rope', 'input_gate'])
    assert [x.name for x in some] == ['input_gate', 'rope']
    assert ablation.select_rows(rows, None) == rows
    with pytest.raises(UsageError, match='no row x, y; there are baseline, input_gate'):
        ablation.select_rows(rows, ['y', 'x', 'rope'])


def test_folder_without_rows(tmp_path):
    with pytest.raises(UsageError, match='no config in .* is a row'):
        ablation.load_rows(tmp_path)


def test_row_on_another_data_set(data):
    cfg = ablation.row_config(row('rope'), data, ['train_cfg.max_iters=7'])
    assert cfg.model.backbone.type == 'mmvssm.LinearAttentionStudy'
    assert cfg.model.backbone.position == ('rope',)
    assert cfg.model.backbone.arch.dims == 8 and cfg.model.backbone.img_size == 64
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        assert head.num_classes == 3 and head.channels == 8
    assert cfg.model.decode_head.type == 'UPerHead'
    assert cfg.model.decode_head.in_channels == [8, 16, 32, 64]
    assert cfg.model.auxiliary_head.in_channels == 32
    # What is the data set's is so as a whole: nothing of ADE20K is left in it.
    assert 'persistent_workers' not in cfg.train_dataloader
    assert cfg.train_cfg.max_iters == 7
    assert 'backbones' not in cfg


def test_row_as_it_is():
    cfg = ablation.row_config(row('ape'))
    assert cfg.model.decode_head.num_classes == 150
    assert cfg.model.decode_head.in_channels == [96, 192, 384, 768]
    assert cfg.train_cfg.max_iters == 160000


def test_plain_data_config_brings_its_classes():
    path = REPO / 'configs/_base_/datasets/quickstart.py'
    cfg = ablation.row_config(row('baseline'), str(path))
    assert cfg.model.decode_head.num_classes == 8
    assert cfg.model.auxiliary_head.num_classes == 8
    assert cfg.model.backbone.arch == 't'


def test_wrong_option_is_one_error(data):
    for option, message in (
        ('model.backbone.design=x', 'backbone of row rope: design must be'),
        ('model.backbone.x=1', 'backbone of row rope'),
        ('train_cfg.max_iters.x=1', 'does not fit'),
    ):
        with pytest.raises(UsageError, match=message):
            ablation.row_config(row('rope'), data, [option])


def test_train_skip_and_go_on(data, tmp_path, monkeypatch):
    rope = row('rope')

    def train(seed=0, options=None):
        cfg = ablation.row_config(rope, data, options)
        ablation.claim_work_dir(tmp_path, cfg)
        return ablation.train_row(rope, cfg, seed, tmp_path)

    # Interrupted after the last iteration, before the test.
    monkeypatch.setattr(Runner, 'test', lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train()
    monkeypatch.undo()
    folder = tmp_path / 'rope' / 'seed_0'
    assert not list(ablation.finished([rope], tmp_path))
    checkpoint = folder / 'iter_2.pth'
    written = checkpoint.stat().st_mtime_ns
    first = train()
    assert checkpoint.stat().st_mtime_ns == written
    assert (first['row'], first['seed'], first['metric']) == ('rope', 0, 'mIoU')
    assert 0 <= first['value'] <= 100 and first['value'] == first['metrics']['mIoU']
    assert first['seconds_per_iteration'] > 0

    # Finished: nothing is built.
    monkeypatch.setattr(ablation, 'build_runner', None)
    assert train() == first == json.loads((folder / 'result.json').read_text())
    monkeypatch.undo()

    second = train(seed=1)
    assert list(ablation.finished([row('baseline'), rope], tmp_path)) == [first, second]

    with pytest.raises(UsageError, match=r'other settings \(train_cfg\)'):
        train(options=['train_cfg.max_iters=3'])
    with pytest.raises(UsageError, match='begun with another model'):
        train(options=['model.backbone.shortcut=True'])
    # Of a row's own head the settings that all rows share say nothing.
    cfg = ablation.row_config(rope, data)
    cfg.model.decode_head.dropout_ratio = 0.5
    with pytest.raises(UsageError, match='begun with another model'):
        ablation.train_row(rope, cfg, 0, tmp_path)


def test_missing_data_and_metric(data, tmp_path):
    rope = row('rope')
    with pytest.raises(UsageError, match='no data'):
        ablation.train_row(rope, ablation.row_config(rope), 0, tmp_path)
    cfg = ablation.row_config(rope, data)
    with pytest.raises(UsageError, match='no metric bbox_mAP; there are aAcc, mIoU'):
        ablation.train_row(rope, cfg, 0, tmp_path, 'bbox_mAP')
