"""The Triton backend without a GPU: interpreted."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    find_spec('triton') is None, reason='Triton is not installed'
)
HERE = Path(__file__).parent

# The last ones are those of every backend.
INTERPRETED = (
    ['triton_interpreted.py'],
    ['triton_interpreted_models.py'],
    ['test_ss2d_scan.py'],
    ['test_scan_orders.py'],
    ['test_bidirectional_scan.py', 'test_add_norm.py'],
)


@pytest.mark.parametrize('files', INTERPRETED, ids=lambda files: files[0])
def test_in_the_interpreter(files):
    """Numbers and gradients; see the files."""
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider']
        + ['-k', 'triton and not number_of_threads']
        + [*(str(HERE / file) for file in files)],
        cwd=HERE.parents[1],
        env={**os.environ, 'TRITON_INTERPRET': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # All of them skipped would be no failure either.
    passed, _, _ = done.stdout.strip().splitlines()[-1].partition(' passed')
    assert int(passed) >= 3, done.stdout
