"""The table against models, configs and metafile."""

import re
from pathlib import Path

import pytest

import mmvssm
from mmvssm.errors import ZooError
from mmvssm.zoo import TABLE, find, of_config
from tiny import REPO

ROWS = list(TABLE.values())
each = pytest.mark.parametrize('row', ROWS, ids=lambda row: row.name)
CONFIGS = {path.stem for path in (REPO / 'configs').glob('*.py')}


@each
def test_row(row):
    assert row.model in mmvssm.list_models()
    assert row.metrics and all(0 < value < 100 for value in row.metrics.values())
    assert row.licence and row.evaluation
    if row.url is None:
        assert row.file == '' and row.copy is None
    else:
        assert re.fullmatch(r'https://[^\s]+', row.url)
        assert Path(row.file).name == row.file and row.file.endswith('.pth')
    if row.kind == 'classifier':
        assert not row.configs
    else:
        assert row.name == row.configs[0]


def test_files_and_addresses_are_unique():
    rows = [row for row in ROWS if row.url]
    assert (
        len({row.file for row in rows}) == len({row.url for row in rows}) == len(rows)
    )
    configs = [config for row in ROWS for config in row.configs]
    assert len(set(configs)) == len(configs)


def test_find():
    assert find('mmvssm://vim_t') is find('vim_t') is TABLE['vim_t']
    assert of_config('upernet_vmamba_t_ema') is TABLE['upernet_vmamba_t']
    assert of_config('upernet_vmamba_quickstart') is None
    with pytest.raises(ZooError, match='did you mean upernet_vmamba_'):
        find('upernet_vmamba_tt')


def test_models_with_weights():
    have = mmvssm.list_models(pretrained=True)
    assert 'vim_t' in have and 'mambar_t' not in have
    assert set(have) == {
        row.name for row in ROWS if row.kind == 'classifier' and row.url
    }
    with pytest.raises(ZooError, match="ever published for 'mambar_t'"):
        mmvssm.build_classifier('mambar_t', pretrained=True)


@pytest.mark.parametrize(
    'name, copy',
    [
        ('vmamba_t_v0', 'model'),
        ('vim_b', 'model_ema'),
        ('vim_t', 'model'),
        ('mlla_b', None),
    ],
)
def test_copies(name, copy):
    assert find(name).copy == copy
