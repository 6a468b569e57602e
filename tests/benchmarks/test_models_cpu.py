"""models_cpu.py: rows are kept, tables are right."""

import json
from dataclasses import asdict

import pytest
import torch
from PIL import Image

from mmvssm.analysis.measuring import peers
from mmvssm.engine import UsageError


@pytest.fixture
def models_cpu(load):
    before = torch.get_num_threads()
    yield load('models_cpu')
    torch.set_num_threads(before)


def test_what_the_issue_asks_for_is_measured(models_cpu):
    args = models_cpu.parse_args(['--train', '--compile', '--threads', '1', '2'])
    cases = models_cpu.cases(args)
    assert len({case.name for case in cases}) == len(cases) == 3 * 2 * 2 * 2
    assert [(c.height, c.batch) for c in cases[::4]] == [
        (size, batch) for size in (224, 512, 1024) for batch in (1, 8)
    ]
    names = {contender.name for contender in models_cpu.contenders(args)}
    assert len(names) == 9 * 2
    assert {'vmamba_t_s1l8, float32, eager', 'swin_t, float32, compiled'} < names
    assert args.json.parent.name == 'models_cpu' and args.json.suffix == '.json'
    args = models_cpu.parse_args(['--quick', '--sizes', '32', '32x48'])
    assert args.json is None and args.sizes == [(32, 32), (32, 48)]


@pytest.mark.parametrize(
    'arguments', [['--sizes', '0'], ['--sizes', '1x2x3'], ['--batch', 'x']]
)
def test_what_is_no_number_is_refused(models_cpu, arguments, capsys):
    with pytest.raises(SystemExit) as end:
        models_cpu.parse_args(arguments)
    assert end.value.code == 2
    assert repr(arguments[1]) in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'text'),
    [
        (['--quick', '--models', 'vim_z'], "no model 'vim_z'"),
        (['--quick', '--against', 'nothing'], "no model 'nothing'"),
        (['--quick', '--show'], '--show needs --json FILE'),
        (['--show', '--json', 'missing.json'], 'missing.json has no rows'),
    ],
)
def test_wrong_use_is_one_sentence(models_cpu, arguments, text):
    with pytest.raises(UsageError, match=text):
        models_cpu.main(models_cpu.parse_args(arguments))


def fake(case, who, speeds, left_out=()):
    """A row as :func:`models_cpu.measure` gives it."""
    found = {
        contender.name: dict(
            images_per_second=speeds.get(contender.model, 1.0),
            peak_bytes=4e6 if contender.model == 'swin_t' else 3e6,
        )
        for contender in who
        if contender.name not in left_out
    }
    return dict(
        case=asdict(case), contenders=found, left_out=dict.fromkeys(left_out, 'slow')
    )


def test_rows_that_are_there_are_kept(models_cpu, monkeypatch, tmp_path, capsys):
    out = tmp_path / 'rows.json'
    measured = []

    def measure(case, who, effort, longest):
        if case.batch == 7:
            raise KeyboardInterrupt
        measured.append((case.batch, sorted({one.model for one in who})))
        return fake(case, who, {}, ['vim_t, float32, eager'])

    monkeypatch.setattr(models_cpu, 'measure', measure)

    def main(*arguments):
        measured.clear()
        options = ['--sizes', '32', '--threads', '1', '--json', str(out)]
        return models_cpu.main(models_cpu.parse_args([*options, *arguments]))

    assert main('--models', 'vim_t', 'deit_s', '--batch', '1', '7', '2') == 130
    assert measured == [(1, ['deit_s', 'vim_t'])]
    assert 'the same command goes on' in capsys.readouterr().out
    # What was left out counts as measured, and fewer models are no new row.
    assert main('--models', 'vim_t', 'deit_s', '--batch', '1', '2') == 0
    assert measured == [(2, ['deit_s', 'vim_t'])]
    assert main('--models', 'vim_t', '--batch', '1', '2') == 0
    assert not measured
    assert main('--models', 'vim_t', '--batch', '1', '--again') == 0
    assert measured == [(1, ['vim_t'])]
    assert main('--models', 'vim_t', 'deit_s', '--batch', '1') == 0
    assert measured == [(1, ['deit_s', 'vim_t'])]
    result = json.loads(out.read_text())
    assert [row['case']['batch'] for row in result['rows']] == [1, 2]
    assert [row['run'] for row in result['rows']] == [3, 1]
    # A run that measured nothing leaves no trace.
    assert len(result['runs']) == 4
    assert main('--show') == 0
    assert not measured

    with pytest.raises(UsageError, match='another machine or of --quick'):
        main('--quick')
    monkeypatch.setattr(models_cpu.machines, 'name', lambda: 'another')
    with pytest.raises(UsageError, match='not another; name another --json'):
        main('--models', 'vim_t')
    out.write_text('{}')
    with pytest.raises(UsageError, match='no result of this benchmark'):
        main('--models', 'vim_t')


@pytest.fixture
def result(load, models_cpu):
    """Two sizes, with one model left out of a case."""
    args = models_cpu.parse_args(
        ['--models', 'vim_t', 'swin_t', 'deit_s', '--sizes', '32', '64', '--batch', '1']
        + ['--threads', '1', '--train', '--compile', '--dtypes', 'float32', 'bfloat16']
    )
    speeds = dict(vim_t=3.0, swin_t=2.0, deit_s=1.0)
    rows = []
    for case in models_cpu.cases(args):
        left_out = ['deit_s, float32, eager'] if case.height == 64 else []
        row = fake(case, models_cpu.contenders(args), speeds, left_out)
        row['contenders']['vim_t, bfloat16, eager']['images_per_second'] = 6.0
        rows.append(dict(row, name=case.name, run=0))
    found = dict(
        largest=0.5, largest_over_std=2.0, same_class=0.75, classes=3, images=4
    )
    rows.append(
        dict(
            name='difference',
            dtype='bfloat16',
            size=[32, 32],
            contenders=dict(vim_t=found),
            left_out={},
        )
    )
    facts = dict(load('machines').facts(), quick=False)
    sets = 'avx2 avx512_bf16 amx_bf16'
    facts['environment']['Machine']['instruction sets'] = sets
    return dict(runs=[facts], rows=rows)


def lines_below(text, title):
    """Cells of the table under a title, by the name of the line."""
    table = text.partition(f'{title}\n\n')[2].partition('\n\n')[0].splitlines()
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in table]
    return {name: values for name, *values in cells}


def test_tables(load, result):
    text = load('models_cpu_report').summary(result, 'swin_t')
    title = 'inference, 1 thread, float32, eager: images a second (times swin_t)'
    assert lines_below(text, title) == {
        '': ['32x32, batch 1', '64x64, batch 1'],
        '-' * 8: ['-' * 16, '-' * 16],
        'vim_t': ['3 (1.50)', '3 (1.50)'],
        'swin_t': ['2 (1.00)', '2 (1.00)'],
        'deit_s': ['1 (0.50)', ''],
    }
    gains = lines_below(
        text,
        'training, 1 thread, bfloat16, eager: times its own speed in float32, eager',
    )
    assert gains['vim_t'] == ['2.00', '2.00'] and gains['deit_s'] == ['1.00', '']
    memory = 'peak memory of a step, MB (times swin_t)'
    found = lines_below(text, f'training, 1 thread, float32, compiled: {memory}')
    assert found['vim_t'] == ['3 (0.75)', '3 (0.75)']
    assert found['swin_t'] == ['4 (1.00)', '4 (1.00)']
    difference = lines_below(
        text,
        'Logits of bfloat16 beside those of float32, random weights, random images of '
        '32x32',
    )
    assert difference['vim_t'] == ['0.5', '2', '75 %', '3', '4']
    missing = '- inference, 64x64, batch 1, 1 thread: deit_s, float32, eager: slow'
    assert missing in text.splitlines()
    assert 'Instructions for bfloat16: avx512_bf16, amx_bf16.' in text
    result['runs'][0]['environment']['Machine']['instruction sets'] = 'avx2'
    text = load('models_cpu_report').summary(result, 'swin_t')
    assert 'Instructions for bfloat16: none.' in text
    # Without Swin the first model takes its place.
    assert '(times vim_t)' in load('models_cpu_report').summary(result, 'mlla_t')


def test_picture(load, result, tmp_path):
    pytest.importorskip('matplotlib')
    plot = load('models_cpu_plot').plot
    path = plot(result, 'swin_t', tmp_path / 'new' / 'picture.png')
    assert Image.open(path).width > 1000


def test_quick_run(models_cpu, monkeypatch, tmp_path):
    monkeypatch.setattr(
        models_cpu.probe,
        'probe',
        lambda contender, case, longest: dict(parameters=1, peak_bytes=2),
    )
    monkeypatch.setitem(
        models_cpu.PEERS,
        'small',
        lambda size: peers.ConvNeXt(1000, depths=(1, 1), dims=(8, 16)),
    )
    out = tmp_path / 'q.json'
    options = ['--quick', '--train', '--models', 'small', 'vim_t', '--sizes', '32']
    options += ['--dtypes', 'float32', 'bfloat16', '--against', 'vim_t']
    options += ['--json', str(out)]
    assert models_cpu.main(models_cpu.parse_args(options)) == 0
    result = json.loads(out.read_text())
    assert [row['name'] for row in result['rows']] == [
        'inference, 32x32, batch 1, 1 thread',
        'training, 32x32, batch 1, 1 thread',
        'difference of bfloat16, 32x32',
    ]
    for row in result['rows'][:2]:
        assert not row['left_out'] and len(row['contenders']) == 4
        for found in row['contenders'].values():
            assert found['images_per_second'] == pytest.approx(1 / found['median'])
            assert found['calls'] >= 2 and found['peak_bytes'] == 2
    assert set(result['rows'][2]['contenders']) == {'small', 'vim_t'}
