"""Tiles that were measured: looked up, kept, found. No GPU is needed."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from mmvssm.ops.cache import CACHE_VARIABLE
from mmvssm.ops.triton import tiles, tune, tuning

GPU = 'A chip, 9.0, Triton 1.2'


class Tile(NamedTuple):
    channels: int
    warps: int


@tuning.tunable
def some_tile(states, channels):
    return Tile(8 * states, 1)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU whose tiles are kept in a file of this test; returns the file."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / 'cache'))
    monkeypatch.setattr(tuning, 'device_key', lambda: GPU)
    tuning.table.cache_clear()
    yield tuning.path()
    tuning.table.cache_clear()


def test_what_is_measured_is_preferred(gpu):
    assert some_tile(2, 64) == Tile(16, 1)
    tuning.record('some_tile', (2, 64), dict(channels=32, warps=4), 1e-3)
    assert some_tile(2, 64) == Tile(32, 4)
    assert some_tile(2, 65) == Tile(16, 1)
    # A number that this version does not know is not for it.
    tuning.record('some_tile', (3, 1), dict(channels=4, stages=9), 1e-3)
    assert some_tile(3, 1) == Tile(4, 1)


def test_other_gpus_and_versions_have_tiles_of_their_own(gpu, monkeypatch):
    tuning.record('some_tile', (2, 64), dict(channels=32), 1e-3)
    monkeypatch.setattr(tuning, 'device_key', lambda: 'A chip, 9.0, Triton 1.3')
    assert some_tile(2, 64) == Tile(16, 1)
    tuning.record('some_tile', (2, 64), dict(channels=4), 1e-3)
    assert some_tile(2, 64) == Tile(4, 1)
    monkeypatch.setattr(tuning, 'device_key', lambda: GPU)
    assert some_tile(2, 64) == Tile(32, 1)


def test_key_names_chip_and_triton(monkeypatch):
    triton = pytest.importorskip('triton')
    monkeypatch.setattr(tuning.runtime, 'INTERPRETED', False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 17)
    gpu = SimpleNamespace(name='A chip', major=9, minor=0)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', {17: gpu}.get)
    assert tuning.device_key() == f'A chip, 9.0, Triton {triton.__version__}'
    tuning._key_of.cache_clear()
    monkeypatch.setattr(tuning.runtime, 'INTERPRETED', True)
    assert tuning.device_key() is None


def test_file_is_read_once(gpu, monkeypatch):
    tuning.record('some_tile', (2, 64), dict(channels=32), 1e-3)
    assert some_tile(2, 64) == Tile(32, 1)
    gpu.unlink()
    assert some_tile(2, 64) == Tile(32, 1)


def test_what_others_wrote_is_kept(gpu):
    tuning.record('some_tile', (1, 1), dict(channels=2), 1e-3)
    found = json.loads(gpu.read_text())
    found[GPU]['other_tile'] = {'5': dict(tile=dict(rows=3), seconds=1.0)}
    gpu.write_text(json.dumps(found))
    tuning.record('some_tile', (2, 2), dict(channels=4), 1e-3)
    kept = json.loads(gpu.read_text())[GPU]
    assert kept['other_tile'] == found[GPU]['other_tile']
    assert kept['some_tile'].keys() == {'1,1', '2,2'}
    assert [path.name for path in gpu.parent.iterdir()] == ['triton_tiles.json']


@pytest.mark.parametrize(
    'text',
    [
        '{"A chip',
        '[1, 2]',
        '{"chip": 3}',
        '{"chip": {"some_tile": {"2,64": {"seconds": 1}}}}',
        '{"chip": {"some_tile": {"2,64": {"tile": {"channels": "8"}}}}}',
        '{"chip": {"some_tile": {"2,64": {"tile": {"channels": 0}}}}}',
        '\ufffe',
    ],
)
def test_broken_file_is_ignored_with_one_warning(gpu, text):
    gpu.parent.mkdir()
    gpu.write_bytes(text.encode('utf-16' if text == '\ufffe' else 'utf-8'))
    with pytest.warns(UserWarning, match='measured tiles are ignored.*cannot be read'):
        assert some_tile(2, 64) == Tile(16, 1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert some_tile(2, 64) == Tile(16, 1)
    tuning.record('some_tile', (2, 64), dict(channels=32), 1e-3)
    assert some_tile(2, 64) == Tile(32, 1)


def test_where_there_is_no_gpu_nothing_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    tuning.path().mkdir()
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    tuning.table.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert some_tile(2, 64) == Tile(16, 1)
    with pytest.raises(RuntimeError, match='there is none'):
        tuning.record('some_tile', (2, 64), dict(channels=32), 1e-3)


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert tuning.path() == tmp_path / 'mmvssm' / 'triton_tiles.json'
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert tuning.path() == tmp_path / '.cache' / 'mmvssm' / 'triton_tiles.json'
    monkeypatch.setenv(CACHE_VARIABLE, '~/mine')
    assert tuning.path() == tmp_path / 'mine' / 'triton_tiles.json'


def test_trial_ends_with_an_error_inside():
    with (
        pytest.raises(ValueError),
        tuning.trying('some_tile', (1, 1), dict(warps=2)),
    ):
        assert some_tile(1, 1) == Tile(8, 2)
        assert some_tile(1, 2) == Tile(8, 1)
        with tuning.trying('some_tile', (1, 1), dict(warps=4)):
            assert some_tile(1, 1) == Tile(8, 4)
        assert some_tile(1, 1) == Tile(8, 2)
        raise ValueError
    assert some_tile(1, 1) == Tile(8, 1)


# Tuning


def task(run, fixed=()):
    return tune.Task(some_tile, (4, 64), lambda: [torch.ones(3)], run, fixed)


def test_fastest_tile_is_found_and_used(gpu):
    """Several steps away from where it begins, past tiles that do not do."""
    used, said = [], []

    def run(x):
        tile = some_tile(4, 64)
        used.append(tile)
        if tile.warps == 16:
            raise MemoryError('out of resources')
        # Quick, and wrong.
        return [2 * x if tile == Tile(64, 2) else x]

    def time(function):
        function()
        tile = used[-1]
        if tile == Tile(64, 2):
            return 0.0
        return abs(tile.channels - 128) / 100 + abs(tile.warps - 8) / 8 + 0.5

    assert tune.tune(task(run), time, said.append) == Tile(128, 8)
    assert some_tile(4, 64) == Tile(128, 8)
    entry = json.loads(gpu.read_text())[GPU]['some_tile']['4,64']
    assert entry == dict(tile=dict(channels=128, warps=8), seconds=0.5)
    assert len(said) == 1 and 'some_tile(4, 64): (128, 8) 500.000 ms' in said[0]
    # Each is tried once, and the first one is measured beside it.
    assert used.count(Tile(256, 8)) == 2 and Tile(128, 16) in used


def test_what_must_stay_stays(gpu):
    tried = set()

    def run(x):
        tried.add(some_tile(4, 64))
        return [x]

    tune.tune(task(run, fixed=('channels',)), lambda f: 1.0, lambda line: None)
    assert {tile.channels for tile in tried} == {32} and len(tried) == 2


def test_default_that_fails_is_no_tile(gpu):
    def run(x):
        raise RuntimeError('no kernel')

    with pytest.raises(RuntimeError, match='no kernel'):
        tune.tune(task(run), lambda f: 1.0)
    assert not gpu.exists()


def test_nan_is_no_result(gpu):
    def run(x):
        return [x if some_tile(4, 64) == Tile(32, 1) else x * float('nan')]

    assert tune.tune(task(run), lambda f: 1.0, lambda line: None) == Tile(32, 1)


@pytest.mark.parametrize(
    'tile',
    [
        tiles.scan_tile(1, 96, True),
        tiles.scan_tile(16, 768, False),
        tiles.convolution_tile(384),
    ],
)
def test_neighbours(tile):
    found = tune.neighbours(tile)
    assert len(found) > 5 and tile not in found and len(set(found)) == len(found)
    for other in found:
        changed = [n for n in tile._fields if getattr(tile, n) != getattr(other, n)]
        assert 1 <= len(changed) <= 2
        for name in tile._fields:
            number = getattr(other, name)
            # As the kernels need it.
            assert number >= 1 and number & (number - 1) == 0
        assert tiles.SCAN_CHUNK % getattr(other, 'part', 1) == 0


def test_tasks_are_what_models_ask_for():
    found = {(t.name, t.sizes) for t in tune.tasks(['vmamba_t', 'vim_s'], 224, 2)}
    assert found == {
        *(
            ('scan_tile', (*sizes, backward))
            for sizes in ((1, 96), (1, 192), (1, 384), (1, 768), (16, 768))
            for backward in (False, True)
        ),
        ('convolution_tile', (768,)),
        ('norm_tile', (384,)),
    }
    names = [*tune.VMAMBA, *tune.PLAIN]
    every = [(t.name, t.sizes) for t in tune.tasks(names, 224, 2)]
    assert len(set(every)) == len(every)


def test_other_tiles_compute_the_same():
    """In the interpreter; see triton_interpreted_tiles.py."""
    pytest.importorskip('triton')
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider']
        + [str(here / 'triton_interpreted_tiles.py')],
        cwd=here.parents[1],
        env={**os.environ, 'TRITON_INTERPRET': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed, _, _ = done.stdout.strip().splitlines()[-1].partition(' passed')
    assert int(passed) > 0, done.stdout


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr('sys.argv', ['tune'])
    assert tune.main(tune.parse_args()) == 2
    assert capsys.readouterr().err.startswith('error: ')
