"""The tool that trains the ablation, run as its users run it."""

import runpy
import sys

import pytest

from ablation_data import write_data_config
from mmvssm.analysis.measuring import timing
from mmvssm.analysis.measuring.timing import Effort
from test_tools import TOOLS, fail, run

pytest.importorskip('mmseg')


def test_rows_in_one_table(tmp_path):
    write_data_config(tmp_path)
    options = ('--rows', 'shortcut', 'baseline', '--data', 'data.py')
    output = run('run_ablation.py', *options, '--work-dir', 'out', cwd=tmp_path)
    assert 'baseline, seed 0: mIoU ' in output
    assert output.count('This training starts from random weights') == 2
    table = (tmp_path / 'out' / 'ablation.md').read_text()
    assert table in output
    assert [line.split('|')[1].strip() for line in table.splitlines()[2:]] == [
        'Baseline',
        '+ Shortcut',
    ]
    for kind in ('csv', 'png'):
        assert (tmp_path / 'out' / f'ablation.{kind}').stat().st_size > 0


def test_count(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['run_ablation.py', '--count', '--rows', 'rope'])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOLS / 'run_ablation.py'), run_name='__main__')
    assert not stop.value.code
    line = '| RoPE for the forget gate | [rope](rope.py) | 28.27 M | 28 M |'
    assert line in capsys.readouterr().out


def test_speed(monkeypatch, capsys):
    """Of rows with and without figures of the paper, in turns."""
    monkeypatch.setattr(timing, 'Effort', lambda **_: Effort(1, 0.0, 0.0))
    folder = str(TOOLS.parent / 'configs/ablation_scan')
    words = ['--speed', '--configs', folder, '--rows', 'unidi_ndw', 'relu']
    monkeypatch.setattr(sys, 'argv', ['run_ablation.py', *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOLS / 'run_ablation.py'), run_name='__main__')
    assert not stop.value.code
    about, *table = capsys.readouterr().out.splitlines()
    assert about.startswith('batch 1, ') and len(table) == 4
    for line in table[2:]:
        _, name, *cells, _ = (cell.strip() for cell in line.split('|'))
        assert name in ('Unidi-Scan, no DWConv', 'ReLU in SS2D')
        inference, _, paper, training, *_ = cells
        assert float(inference) > float(training) > 0
        assert paper == ('1.00' if name.startswith('Unidi') else '-')


def test_mistakes(monkeypatch, capsys, tmp_path):
    for args, message in (
        (('--rows', 'bert'), 'no row bert; there are baseline, '),
        (('--rows', 'rope', '--data', 'no.py'), 'no config file at '),
        (('--rows', 'rope', '--work-dir', tmp_path / 'x'), 'no data.'),
        (('--configs', tmp_path), 'is a row'),
        (('--speed', '--threads', '-1'), 'at least 1'),
    ):
        assert message in fail(monkeypatch, capsys, 'run_ablation.py', *args)
