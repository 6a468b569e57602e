"""mmengine reads checkpoints as safely as this package does.

Two ways, of which only the second changes anything for other code in the process:

- :func:`safely` marks the name of one file. The mark is a scheme of its own that is
  added to mmengine's table of loaders.
- :func:`install_safe_loaders` replaces mmengine's loaders of files, http(s) addresses
  and object stores.

Where a file cannot be read safely the maintained fork of mmengine warns, and then runs
what the file holds.
"""

import re
from typing import Any

from mmengine.fileio import get_file_backend
from mmengine.runner.checkpoint import CheckpointLoader

from mmvssm import zoo
from mmvssm.checkpoints import convert
from mmvssm.checkpoints.read import read_content

_SAFE = 'mmvssm-safe:'


def install_safe_loaders() -> None:
    """Have mmengine read files, addresses and object stores safely in this process.

    Replaces its loaders: for its runner, its ``init_cfg``, and the inferencers and
    ``init_model`` functions of mmseg and mmdet. The tools call this when they start;
    importing the package does not. In a script of your own, call it before you load a
    checkpoint that you did not make. Calling it again changes nothing.
    """
    for pattern, loader in _LOADERS.items():
        CheckpointLoader.register_scheme(pattern, loader, force=True)


def safely(name: str) -> str:
    """The name under which mmengine reads a file safely, whatever loaders it has.

    Args:
        name: A path, an http(s) address, or an object's name. Others, such as
            ``openmmlab://``, are mmengine's own business and stay as they are.
    """
    known = not name.startswith(_SAFE) and _loader_for(name) is not None
    return _SAFE + name if known else name


@CheckpointLoader.register_scheme(_SAFE, force=True)
def load_from_safe(filename: str, map_location: Any = None) -> Any:
    """Read what :func:`safely` has marked."""
    name = filename.removeprefix(_SAFE)
    return _loader_for(name)(name, map_location)


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


@CheckpointLoader.register_scheme(zoo.SCHEME, force=True)
def load_from_zoo(filename: str, map_location: Any = None) -> dict:
    """Fetch published weights, under the names of this package.

    mmengine's inferencers and ``init_model`` of mmseg and mmdet take them by name, too.
    """
    content = load_from_local(filename, map_location)
    meta = content.get('meta') if isinstance(content, dict) else None
    meta = dict(meta) if isinstance(meta, dict) else {}
    checkpoint = convert(filename)
    if checkpoint.contents == 'segmentor' and not _classes(meta):
        # mmseg would take those of Cityscapes.
        from mmseg.datasets import ADE20KDataset

        meta['dataset_meta'] = dict(ADE20KDataset.METAINFO)
    return dict(state_dict=checkpoint.state_dict(), meta=meta)


def _classes(meta: dict) -> Any:
    described = meta.get('dataset_meta')
    described = described if isinstance(described, dict) else {}
    return described.get('classes') or meta.get('CLASSES')


# By mmengine's own patterns. The empty one is for what no other is for.
_LOADERS = {
    'http://': load_from_http,
    'https://': load_from_http,
    zoo.HF_SCHEME: load_from_zoo,
    r'(\S+\:)?s3://': load_from_ceph,
    r'(\S+\:)?petrel://': load_from_ceph,
    '': load_from_local,
}


def _loader_for(name: str) -> Any:
    for pattern, loader in _LOADERS.items():
        if re.match(pattern, name) and (pattern or '://' not in name):
            return loader
    return None
