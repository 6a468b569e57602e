"""Models small enough to study in a test, and the tool in this process."""

import json
import runpy
import sys

from mmengine.config import Config

import tiny
import tiny_det
from tiny import REPO

SEGMENTORS = {
    'vmamba': 'upernet_vmamba_t.py',
    'vim': 'upernet_vim_t.py',
    'mambar': 'upernet_mambar_s.py',
    'mlla': 'upernet_mlla_t.py',
}
DETECTOR = 'mask_rcnn_vmamba_t_1x.py'


def write_segmentor(folder, family):
    """Write a tiny config of a segmentor of a family; returns the path."""
    cfg = tiny.shrink(Config.fromfile(REPO / 'configs' / SEGMENTORS[family]))
    path = folder / f'{family}.py'
    cfg.dump(path)
    return path


def write_detector(folder):
    """Write a tiny config of a detector; returns the path."""
    cfg = tiny_det.shrink(Config.fromfile(REPO / 'configs' / DETECTOR))
    path = folder / 'detector.py'
    cfg.dump(path)
    return path


def analyze(monkeypatch, *args):
    """Run ``tools/analyze.py`` here; returns its exit code."""
    monkeypatch.setattr(sys, 'argv', ['analyze.py', *map(str, args)])
    try:
        runpy.run_path(str(REPO / 'tools' / 'analyze.py'), run_name='__main__')
    except SystemExit as stop:
        return stop.code or 0
    raise AssertionError('a tool ends with an exit code')


def results_of(folder, study):
    """What the study wrote."""
    return json.loads((folder / f'{study}.json').read_text())
