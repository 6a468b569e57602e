"""Builds the package; everything that is only metadata is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent


def fill_mim_folder() -> None:
    """Replace git's stand-ins for the links in ``mmvssm/.mim`` by copies.

    OpenMMLab's tools look for configs and scripts inside the package, so
    ``mmvssm/.mim`` links to them. A checkout without symbolic links (Windows,
    by default) has small text files holding the link's target instead.
    """
    for link in (ROOT / 'mmvssm' / '.mim').iterdir():
        if link.is_symlink() or not link.is_file():
            continue
        source = ROOT / link.name
        if link.read_text(encoding='utf-8').strip() != f'../../{link.name}':
            continue
        link.unlink()
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, link)


fill_mim_folder()
setup()
