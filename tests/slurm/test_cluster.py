"""The tests' Slurm itself: it leaves nothing behind."""

import pytest

from toy import wait

from . import cluster as module
from .cluster import install_or_skip, running_cluster


def test_nothing_outlives_a_failed_test():
    with pytest.raises(ZeroDivisionError), running_cluster() as cluster:
        options = ('--parsable', '--output=/dev/null', '--wrap=sleep 1000')
        job = cluster.run('sbatch', *options).strip()
        wait(lambda: cluster.run('squeue', '-h', '-j', job, '-o', '%t') == 'R\n')
        assert list(cluster.processes())
        1 / 0  # noqa: B018
    assert not list(cluster.processes())
    assert not cluster.folder.exists()


@pytest.mark.parametrize(
    ('required', 'outcome'),
    [(False, pytest.skip.Exception), (True, pytest.fail.Exception)],
)
def test_absence_is_a_skip_or_where_required_a_failure(required, outcome, monkeypatch):
    monkeypatch.setattr(module, '_REQUIRED', required)
    monkeypatch.setattr(module.shutil, 'which', lambda *args, **kwargs: None)
    with pytest.raises(outcome, match='apt-get install slurm-wlm munge'):
        install_or_skip()
