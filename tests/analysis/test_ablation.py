import csv

import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip('mmseg')

from mmvssm.analysis import ablation as tables
from mmvssm.analysis.flops import Complexity
from mmvssm.analysis.measuring.timing import Effort
from mmvssm.engine.configs.ablation import Row

ROWS = [
    Row('base', 'Baseline', None, dict(params='28', flops='4.5', top1='77.6')),
    Row('gate', '+ Gate', None, dict(params='29', flops='4.5', top1='77.8')),
    Row('own', 'Our own', None, None),
]


def result(row, seed, value, seconds=0.5):
    return dict(row=row, seed=seed, value=value, seconds_per_iteration=seconds)


RESULTS = [
    result('base', 0, 30.0),
    result('base', 1, 32.0),
    result('gate', 0, 28.5, None),
    result('own', 3, 40.0),
]


def test_summary():
    base, gate, own = tables.summarise(ROWS, RESULTS)
    assert (base['mean'], base['difference'], base['seeds']) == (31.0, 0.0, [0, 1])
    assert (gate['mean'], gate['difference']) == (28.5, -2.5)
    assert gate['paper_difference'] == pytest.approx(0.2)
    assert gate['seconds_per_iteration'] is None and own['seeds'] == [3]
    assert own['paper'] is own['paper_difference'] is None
    # Twice the spread of the baseline is 4.
    assert (base['spread'], gate['spread']) == (2.0, None)
    assert [line['clear'] for line in (base, gate, own)] == [None, False, True]


def test_one_seed_of_the_baseline_has_no_spread():
    summary = tables.summarise(ROWS, [RESULTS[0], *RESULTS[2:]])
    assert [line['clear'] for line in summary] == [None, None, None]


def test_rows_with_some_figures_of_the_paper():
    rows = [ROWS[0], Row('some', 'Some', None, dict(top1='77.0'))]
    some = tables.summarise(rows, [result('base', 0, 1.0), result('some', 0, 2.0)])[1]
    assert some['paper_difference'] == pytest.approx(-0.6)
    counted = Complexity(2_000_000, 3_000_000_000, {})
    line = tables.complexity_table([(rows[1], (counted, None))]).splitlines()[2]
    assert line == '| Some | [some](some.py) | 2.00 M | - | 3.00 G | - | - | - |'


def test_table_of_speeds():
    figures = dict(inference_images_per_second='200', training_images_per_second='50')
    rows = [
        Row('base', 'Baseline', None, figures),
        Row('own', 'Our own', None, None),
        Row('half', 'Half', None, dict(figures, inference_images_per_second='100')),
    ]
    found = (dict(inference=4.0, training=x) for x in (1.0, None, 0.75))
    table = tables.speed_table(rows, dict(zip(('base', 'own', 'half'), found)))
    assert table.splitlines()[2:] == [
        '| Baseline | 4.00 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |',
        '| Our own | 4.00 | 1.00 | - | - | - | - |',
        '| Half | 4.00 | 1.00 | 0.50 | 0.75 | 0.75 | 1.00 |',
    ]


def test_speeds_are_those_of_the_model_that_is_counted(monkeypatch):
    """A row that fails stops no other."""
    built = []

    def build(cfg):
        built.append(cfg)
        if cfg == 'bad':
            raise ValueError('no model')
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 7))

    monkeypatch.setattr(tables, 'build_classifier', build)
    effort = Effort(1, 0.0, 0.0)
    threads = torch.get_num_threads()
    found = tables.measure_speed(dict(a='good', b='bad'), 2, threads, effort)
    assert built == ['good', 'bad'] * 2
    assert all(found['a'][mode] > 0 for mode in ('inference', 'training'))
    assert found['b'] == dict(inference=None, training=None)


def test_summary_without_a_baseline_or_a_row():
    (own,) = tables.summarise(ROWS, RESULTS[3:])
    assert (own['row'], own['mean'], own['difference']) == ('own', 40.0, None)


def test_files(tmp_path):
    summary = tables.summarise(ROWS, RESULTS)
    paths = tables.write_results(summary, 'mIoU', tmp_path / 'new' / 'ablation')
    assert [path.name for path in paths] == [
        'ablation.csv',
        'ablation.md',
        'ablation.png',
    ]
    with paths[0].open(newline='') as file:
        lines = list(csv.DictReader(file))
    assert [line['row'] for line in lines] == ['base', 'gate', 'own']
    assert lines[0]['values'] == '30.0 32.0' and lines[2]['paper'] == ''
    table = paths[1].read_text().splitlines()
    assert len(table) == 2 + len(ROWS)
    assert table[2] == (
        '| Baseline | 31.00 (30.00 to 32.00) | 2.00 | +0.00 | - | 2 | 0.500 | 77.6 '
        '| +0.0 |'
    )
    assert table[3].startswith('| + Gate | 28.50 | - | -2.50 | no | 1 |')
    assert table[4] == '| Our own | 40.00 | - | +9.00 | yes | 1 | 0.500 | - | - |'
    with Image.open(paths[2]) as image:
        assert image.width > 500 and len(image.convert('RGB').getcolors(10**6)) > 10


def test_chart_of_one_row(tmp_path):
    summary = tables.summarise(ROWS, RESULTS[3:])
    with Image.open(tables.draw_results(summary, 'mIoU', tmp_path / 'x.png')) as image:
        image.load()
