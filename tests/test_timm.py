"""mmvssm.timm where timm cannot be imported; tests/vision has the other tests of it."""

import subprocess
import sys

from tiny import REPO

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == 'timm':
            raise ImportError('it is blocked')
sys.meta_path.insert(0, Block())
import mmvssm
try:
    import mmvssm.timm
except ImportError as error:
    print(error.name, error)
"""


def test_what_to_install():
    done = subprocess.run(
        [sys.executable, '-c', BLOCKED], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith('timm mmvssm.timm registers models with timm, and there is')
    assert '(it is blocked): run `make install-vision`, or install timm' in line
