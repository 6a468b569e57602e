"""The folder for kernels and verdicts that were made on this machine.

Environment variables:
    MMVSSM_CACHE_DIR: The folder; by default ``mmvssm`` in XDG_CACHE_HOME or in
        ``~/.cache``.
"""

import os
from pathlib import Path

CACHE_VARIABLE = 'MMVSSM_CACHE_DIR'


def cache_folder() -> Path:
    """The folder; it may not exist yet."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'mmvssm')
