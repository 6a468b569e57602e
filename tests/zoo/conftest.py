import pytest

from mmvssm.zoo import download

from .loopback import Server


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def mirror(server, tmp_path, monkeypatch):
    """The server in the place of all hosts, and a cache of this test's own."""
    monkeypatch.setenv('MMVSSM_ZOO_MIRROR', server.address)
    monkeypatch.setenv('MMVSSM_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setattr(download, '_PAUSE', 0.0)
    return server
