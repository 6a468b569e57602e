"""The tests' Slurm itself: it leaves nothing behind."""

import shutil
import subprocess

import pytest

from tiny import REPO
from toy import wait

from . import cluster as module
from .cluster import running_cluster, skip_unless_installed


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
    monkeypatch.setattr(module.subprocess, 'run', None)
    with pytest.raises(outcome, match='Slurm is not installed'):
        skip_unless_installed()


_APT = """#!/bin/sh
echo "$@" >> {log}
[ -e {policy} ] && echo 'services may not start' >> {log}
case "$*" in install*) exit {code};; esac
"""


@pytest.mark.parametrize('code', [0, 100])
def test_ci_installs_it_and_lets_no_service_start(code, tmp_path):
    policy, log, apt = (tmp_path / x for x in ('policy', 'log', 'apt-get'))
    apt.write_text(_APT.format(log=log, policy=policy, code=code))
    apt.chmod(0o755)
    for name in ('bash', 'chmod', 'rm', 'sh'):
        (tmp_path / name).symlink_to(shutil.which(name))
    script = (REPO / '.ci/install_slurm').read_text()
    # Of this machine's programs none but these.
    for path, other in ((':/usr/sbin:/sbin', ''), ('/usr/sbin/policy-rc.d', policy)):
        assert path in script
        script = script.replace(path, str(other))
    for option in ('--can-fetch', ''):
        done = subprocess.run(
            ['bash', '-c', script, 'install_slurm', option],
            env=dict(PATH=str(tmp_path)),
        )
        assert done.returncode == code
    update, fetch, again, forbidden, install, *rest = log.read_text().splitlines()
    assert update == again == 'update -q'
    assert '--download-only' in fetch and '--download-only' not in install
    assert install.startswith('install') and 'slurm-wlm munge' in install
    assert forbidden == rest[-1] == 'services may not start'
    assert not policy.exists()
