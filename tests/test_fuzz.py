"""Some of the spoilt checkpoints and configs of ``python tests/fuzz.py 10000``."""

import os
import sys

import pytest

import warm
from tiny import REPO

pytest.importorskip('mmseg')


@pytest.mark.skipif(sys.platform != 'linux', reason='limits memory as Linux does')
def test_spoilt_files_are_used_as_they_are_or_refused(tmp_path):
    done = warm.run(
        [REPO / 'tests/fuzz.py', '300'],
        cwd=tmp_path,
        env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(REPO)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # What numpy or torch say of a damaged file does not reach the user.
    assert done.stderr == ''
    assert done.stdout.splitlines()[-1].startswith('300 cases, 0 failed')
    ends = {tuple(line.split()[:2]) for line in done.stdout.splitlines()[:-1]}
    kinds = ('config', 'legacy', 'safetensors', 'zip')
    assert ends == {(kind, end) for kind in kinds for end in ('taken', 'refused')}
