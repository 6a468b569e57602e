import argparse
import math

import numpy as np
import pytest
import torch

from mmvssm.analysis.studies import STUDIES
from mmvssm.analysis.studies.common import (
    Study,
    file_name,
    not_finite,
    parse_sizes,
    print_table,
    rounded,
    spread,
)
from mmvssm.engine import UsageError

ONE = Study(name='one', shows='', run=lambda job: {})
MANY = Study(
    name='many',
    shows='',
    run=lambda job: {},
    sizes=((64, 64), (96, 96)),
    several_sizes=True,
)


@pytest.mark.parametrize(
    'study, given, expected',
    [
        (ONE, None, [(224, 224)]),
        (ONE, ['64'], [(64, 64)]),
        (ONE, ['64', '96'], [(64, 96)]),
        (ONE, ['64x96'], [(64, 96)]),
        (MANY, None, [(64, 64), (96, 96)]),
        (MANY, ['64', '96'], [(64, 64), (96, 96)]),
        (MANY, ['64x96', '32'], [(64, 96), (32, 32)]),
    ],
)
def test_sizes(study, given, expected):
    assert parse_sizes(given, study) == expected


@pytest.mark.parametrize(
    'given', [['0'], ['-1'], ['x'], ['8x'], ['1x2x3'], ['a'], ['1', '2', '3'], ['²']]
)
def test_no_sizes(given):
    with pytest.raises(UsageError, match='--size'):
        parse_sizes(given, ONE)


def test_not_finite():
    assert not_finite(dict(a=[1.0, 2], b=dict(c=None, d='nan'))) is None
    assert not_finite(dict(a=[1.0, dict(b=math.nan)])) == 'results.a[1].b'
    assert not_finite([math.inf]) == 'results[0]'


def test_rounded():
    assert rounded(torch.tensor([[1 / 3, 2000.0]])) == [[0.333333, 2000.0]]
    assert rounded(np.float32(0.1)) == 0.1
    assert math.isnan(rounded(math.nan))


def test_spread():
    assert spread(24, 4) == [5, 11, 17, 23]
    assert spread(3, 4) == [0, 1, 2]
    assert spread(6, 1) == [5]


def test_file_name():
    assert file_name('vim_t (2) a/b.pth') == 'vim_t__2__a_b.pth'
    assert file_name('../..') == 'model'


def test_table(capsys):
    print_table(['model', 'value'], [['a', 1.0], ['longer', 22]])
    assert capsys.readouterr().out == ('model   value\na       1.000\nlonger     22\n')


@pytest.mark.parametrize('name', STUDIES)
def test_records(name):
    study = STUDIES[name]
    assert study.name == name
    assert study.shows and '\n' not in study.shows
    study.add_arguments(argparse.ArgumentParser())
