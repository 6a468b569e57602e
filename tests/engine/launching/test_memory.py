import platform
import subprocess
import sys

import pytest

_RESIDENT_AFTER_FREEING = """
import sys
import torch
from mmvssm.engine.launching.memory import keep_freed_memory
if sys.argv[1] == 'keep' and not keep_freed_memory():
    raise SystemExit('the C library has no mallopt')
block = torch.ones(2**26)
del block
status = open('/proc/self/status').read()
print(status.partition('VmRSS:')[2].split()[0])
"""


def resident_mib(mode):
    done = subprocess.run(
        [sys.executable, '-c', _RESIDENT_AFTER_FREEING, mode],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout) / 1024


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='a setting of glibc')
def test_freed_memory_stays():
    """A block of 256 MiB, freed: given back by default, kept if asked."""
    assert resident_mib('keep') - resident_mib('default') > 200
