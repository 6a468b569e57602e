"""Checkpoints that mmengine loads are read as safely as this package's own.

Importing ``mmvssm.engine`` puts these readers in the place of mmengine's, for its
runner, its ``init_cfg`` and the inferencers of mmseg and mmdet. Where a file
cannot be read safely the maintained fork warns, and then runs what it holds.
"""

from typing import Any

from mmengine.fileio import get_file_backend
from mmengine.runner.checkpoint import CheckpointLoader

from mmvssm.checkpoints.read import read_content


def install_safe_loaders() -> None:
    """Have mmengine read files, addresses and object stores safely."""
    # A longer prefix comes first; the empty one is for what no other is for.
    for prefixes, loader in (
        ('', load_from_local),
        (('http://', 'https://'), load_from_http),
        ((r'(\S+\:)?s3://', r'(\S+\:)?petrel://'), load_from_ceph),
    ):
        CheckpointLoader.register_scheme(prefixes, loader, force=True)


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Read a file; see :func:`mmvssm.checkpoints.read.read_content`."""
    content = read_content(filename, map_location)
    meta = content.get('meta') if isinstance(content, dict) else None
    if isinstance(meta, dict):
        # mmengine would run it, as a config, to compare numbers of GPUs.
        meta.pop('config', None)
    return content


# mmengine logs a loader by what follows `load_from_` in its name.
def load_from_http(filename: str, map_location: Any = None) -> Any:
    """Fetch and read the file of an address."""
    return load_from_local(filename, map_location)


def load_from_ceph(filename: str, map_location: Any = None) -> Any:
    """Fetch and read an object."""
    backend = get_file_backend(filename, backend_args=dict(backend='petrel'))
    with backend.get_local_path(filename) as path:
        return load_from_local(str(path), map_location)
