"""Files are whole or not there, whatever the network does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mmvssm.errors import ZooError
from mmvssm.zoo import download, fetch, find, path_of, verify

DATA = os.urandom(3_000_000)
VIM = urlsplit(find('vim_t').url).path


@pytest.fixture
def vim(mirror):
    mirror.files[VIM] = DATA
    return mirror


def ranges(server):
    return [part for _, part in server.requests]


def leftovers(path):
    return {p.name for p in path.parent.iterdir()} - {path.name, '.lock', '.sha256'}


def test_fetched_once(vim):
    path = fetch('mmvssm://vim_t')
    assert path == path_of('vim_t') and path.name == find('vim_t').file
    assert path.read_bytes() == DATA and not leftovers(path)
    assert fetch('mmvssm://vim_t') == path
    assert len(vim.requests) == 1


def test_the_tag_of_github_stays_quoted(mirror):
    name = 'vmamba_t_s1l8'
    path = urlsplit(find(name).url).path
    assert '/%23v2cls/' in path
    mirror.files[path] = DATA
    assert fetch(f'mmvssm://{name}').read_bytes() == DATA


def test_a_name_for_a_file_whose_address_has_none(mirror):
    address = find('mlla_t').url
    assert address.endswith('/?dl=1')
    split = urlsplit(address)
    mirror.files[f'{split.path}?{split.query}'] = DATA
    assert fetch('mmvssm://mlla_t').name == 'mlla_t.pth'


def test_redirected(vim):
    vim.files['/elsewhere'] = DATA
    vim.manners[VIM] = f'redirect {vim.address}/elsewhere'
    assert fetch('mmvssm://vim_t').read_bytes() == DATA


@pytest.mark.parametrize('where', ['../../', '.', ''])
def test_the_server_names_the_file(mirror, where):
    mirror.files['/f/1?dl=1'] = DATA
    mirror.manners['/f/1?dl=1'] = f'named {where}weights.safetensors'
    path = fetch(f'{mirror.address}/f/1?dl=1')
    assert path.name == 'weights.safetensors' and path.read_bytes() == DATA
    assert path.is_relative_to(Path(os.environ['MMVSSM_CACHE_DIR']))
    assert fetch(f'{mirror.address}/f/1?dl=1') == path and len(mirror.requests) == 1


def test_goes_on_where_it_broke_off(vim):
    vim.manners[VIM] = 'breaks once'
    assert fetch('mmvssm://vim_t').read_bytes() == DATA
    assert ranges(vim) == [None, f'bytes={len(DATA) // 2}-']


def test_begins_anew_if_the_file_is_another_one(vim):
    vim.manners[VIM] = 'breaks'
    with pytest.raises(ZooError):
        fetch('mmvssm://vim_t')
    vim.manners[VIM] = ''
    vim.files[VIM] = other = os.urandom(1_000_000)
    assert fetch('mmvssm://vim_t').read_bytes() == other


def test_begins_anew_if_the_server_knows_no_ranges(vim):
    vim.manners[VIM] = 'breaks'
    with pytest.raises(ZooError):
        fetch('mmvssm://vim_t')
    vim.manners[VIM] = 'no ranges'
    assert fetch('mmvssm://vim_t').read_bytes() == DATA


def test_busy(vim):
    vim.manners[VIM] = 'busy once'
    assert fetch('mmvssm://vim_t').read_bytes() == DATA


@pytest.mark.parametrize(
    'manner, message',
    [
        ('breaks', 'broke off after .* of 3000000 bytes .3 tries'),
        ('too long', 'broke off after 3000000 of 3000010 bytes'),
        ('page', 'the server sent a page, not a file'),
        ('redirect http://127.0.0.1:1/none', 'Connection refused'),
    ],
)
def test_what_fails_leaves_no_file(vim, manner, message):
    vim.manners[VIM] = manner
    with pytest.raises(ZooError, match=message) as error:
        fetch('mmvssm://vim_t')
    assert f'put it at {path_of("vim_t")}' in str(error.value)
    assert vim.address in str(error.value) and not path_of('vim_t').exists()


def test_not_found(mirror):
    with pytest.raises(ZooError, match='404'):
        fetch('mmvssm://vim_t')
    assert len(mirror.requests) == 1


def test_no_network(monkeypatch, tmp_path):
    monkeypatch.setenv('MMVSSM_ZOO_MIRROR', 'http://127.0.0.1:1')
    monkeypatch.setenv('MMVSSM_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(download, '_PAUSE', 0.0)
    with pytest.raises(ZooError, match='Connection refused.*MMVSSM_ZOO_MIRROR'):
        fetch('mmvssm://vim_t')


def test_a_file_put_there_by_hand(mirror):
    path = path_of('vim_t')
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA)
    assert fetch('mmvssm://vim_t') == path and not mirror.requests


def test_a_file_that_changes_is_refused(vim):
    path = fetch('mmvssm://vim_t')
    changed = bytearray(DATA)
    changed[1234] ^= 1
    path.write_bytes(changed)
    for again in (fetch, verify):
        with pytest.raises(ZooError, match='not the file that was downloaded at first'):
            again('mmvssm://vim_t')


def test_a_published_hash_is_compared(vim, monkeypatch):
    from dataclasses import replace

    row = replace(find('vim_t'), sha256='0' * 64)
    monkeypatch.setitem(sys.modules['mmvssm.zoo.table'].TABLE, 'vim_t', row)
    with pytest.raises(ZooError, match='not the file that was published'):
        fetch('mmvssm://vim_t')


def test_figures_without_a_file():
    with pytest.raises(ZooError, match='no weights were ever published'):
        fetch('mmvssm://upernet_vim_t')


def test_unknown_name():
    with pytest.raises(ZooError, match="no weights 'vim_tt'; did you mean vim_t"):
        fetch('mmvssm://vim_tt')


def test_bad_mirror(monkeypatch):
    monkeypatch.setenv('MMVSSM_ZOO_MIRROR', 'localhost')
    with pytest.raises(ZooError, match='MMVSSM_ZOO_MIRROR must be an address'):
        fetch('mmvssm://vim_t')


def test_hugging_face_without_its_library(mirror, monkeypatch):
    mirror.files['/me/mine/resolve/main/a/b.safetensors'] = DATA
    mirror.files['/me/mine/resolve/v1/a/b.safetensors'] = DATA[:5]
    monkeypatch.setenv('HF_TOKEN', 'secret')
    path = fetch('hf://me/mine/a/b.safetensors')
    assert path.name == 'b.safetensors' and path.read_bytes() == DATA
    assert fetch('hf://me/mine/a/b.safetensors@v1').read_bytes() == DATA[:5]


@pytest.mark.parametrize('source', ['hf://me/mine', 'hf://mine', 'hf://a/b/../../c'])
def test_bad_address_of_hugging_face(mirror, source):
    with pytest.raises(ZooError, match='hf://OWNER/REPOSITORY/FILE'):
        fetch(source)


def test_hugging_face_by_its_library(tmp_path, monkeypatch):
    """A stand-in for the library, which is not among the requirements."""
    package = tmp_path / 'huggingface_hub'
    package.mkdir()
    (package / '__init__.py').write_text(
        'def hf_hub_download(repository, file, revision):\n'
        '    if revision == "none":\n'
        '        raise ValueError("no such revision\\nat all")\n'
        '    return f"/{repository}/{file}/{revision}"\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    # Where the library is installed, something may have imported it.
    monkeypatch.delitem(sys.modules, 'huggingface_hub', raising=False)
    monkeypatch.delenv('MMVSSM_ZOO_MIRROR', raising=False)
    assert fetch('hf://me/mine/b.pth') == Path('/me/mine/b.pth/main')
    with pytest.raises(ZooError, match='mine/b.pth@none: no such revision$'):
        fetch('hf://me/mine/b.pth@none')
    sys.modules.pop('huggingface_hub')


FETCH = [sys.executable, '-m', 'mmvssm.zoo', 'fetch', 'mmvssm://vim_t']


def test_two_processes_download_once(vim):
    vim.manners[VIM] = 'slow'
    both = [subprocess.Popen(FETCH, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert path_of('vim_t').read_bytes() == DATA and len(vim.requests) == 1


def test_killed_and_resumed(vim):
    vim.manners[VIM] = 'slow'
    process = subprocess.Popen(FETCH)
    part = path_of('vim_t').parent / '.part'
    deadline = time.monotonic() + 100
    # It is buffered: some of it has come when the file has a size.
    while not (part.exists() and part.stat().st_size > 1_000_000):
        assert process.poll() is None and time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.wait()
    have = part.stat().st_size
    assert 0 < have < len(DATA) and not path_of('vim_t').exists()
    assert fetch('mmvssm://vim_t').read_bytes() == DATA
    assert ranges(vim) == [None, f'bytes={have}-']
