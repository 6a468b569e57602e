"""Makes a small data set for segmentation, detection or classification."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from numbers import Integral
from pathlib import Path

import numpy as np

from mmvssm.datasets.layouts import LAYOUTS, SUFFIXES, Ade20kLayout
from mmvssm.datasets.photos import SPLITS, load_regions

QUICKSTART_CLASSES = Ade20kLayout.classes
QUICKSTART_PALETTE = Ade20kLayout.palette
SMALLEST_SIZE = 64


def make_quickstart_dataset(
    root: str | os.PathLike,
    num_train: int = 480,
    num_val: int = 96,
    size: int = 128,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[list], Iterable] = iter,
    layout: str = 'ade20k',
    bands: int = 3,
) -> Path:
    """Make the data set, if it does not exist yet.

    The images are textured shapes over photographs from scikit-image. A class has one
    shape and one texture. Colours, light, pose and scale are drawn in the same way for
    all classes. The two splits use different parts of the photographs. The same
    settings (and the same versions of Pillow, scikit-image and tifffile) give the same
    bytes. The folder gets its name only when it is complete, so an interrupted run
    leaves nothing incomplete.

    Args:
        root (str | os.PathLike): The folder to make. num_train (int): Number of
        training images. Defaults to 480. num_val (int): Number of validation images.
        Defaults to 96. size (int): Shorter side of the images in pixels, at least 64.
        The longer side of
            every fourth image is 5/4 of it; the other images are square. Defaults to
            128.
        seed (int): Seed of the generator, not negative. Defaults to 0.
        overwrite (bool): Whether a data set with other settings may be replaced.
            Defaults to False.
        progress (Callable): Wraps the list of images that are made, as ``tqdm.tqdm``
            does. Defaults to iter.
        layout (str): ``'ade20k'``: images and label maps, see
            :class:`~mmvssm.datasets.layouts.Ade20kLayout`. ``'coco'``: images and
            objects, see :class:`~mmvssm.datasets.layouts.CocoLayout`. ``'imagenet'``:
            a folder of images for each class, see
            :class:`~mmvssm.datasets.layouts.ImageNetLayout`. All also have
            ``meta.json`` with classes, palette and settings. Defaults to 'ade20k'.
        bands (int): 3 for JPEG photos. 4 for TIFF files with a fourth band after red,
            green and blue: how high things are, see
            :func:`~mmvssm.datasets.scenes.random_heights`. The scenes are the same.
            Defaults to 3.

    Returns:
        pathlib.Path: The folder.

    Raises:
        ValueError: If an argument is out of range.
        FileExistsError: If ``root`` contains a data set with other settings and
            ``overwrite`` is False, or contains other files.
        ImportError: If scikit-image is not installed, or pycocotools for COCO's
            layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f'layout must be one of {tuple(LAYOUTS)}, got {layout!r}.')
    if bands not in SUFFIXES:
        raise ValueError(f'bands must be one of {tuple(SUFFIXES)}, got {bands!r}.')
    layout = LAYOUTS[layout](bands)
    counts = dict(zip(SPLITS, (num_train, num_val)))
    _check_settings(
        num_train=(num_train, 1),
        num_val=(num_val, 1),
        size=(size, SMALLEST_SIZE),
        seed=(seed, 0),
    )
    root = Path(root)
    meta = {
        'generator': layout.generator,
        'version': layout.version,
        'classes': list(layout.classes),
        'palette': list(layout.palette),
        'settings': {
            'num_train': int(num_train),
            'num_val': int(num_val),
            'size': int(size),
            'seed': int(seed),
            **({} if bands == 3 else {'bands': bands}),
        },
    }
    if not overwrite and _read_meta(root) == meta and layout.is_whole(root, counts):
        return root
    _check_replaceable(root, meta, overwrite)

    regions = {split: load_regions(split) for split in SPLITS}
    jobs = [(split, index) for split in SPLITS for index in range(counts[split])]
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=root.parent, prefix=f'.{root.name}-'
    ) as scratch:
        made = Path(scratch, 'made')
        made.mkdir()
        layout.start(made)
        for split, index in progress(jobs):
            rng = np.random.default_rng([seed, SPLITS.index(split), index])
            layout.write_sample(made, split, index, regions[split], size, rng)
        layout.finish(made)
        made.joinpath('meta.json').write_text(
            json.dumps(meta, indent=2) + '\n', encoding='utf-8'
        )
        if root.exists():
            shutil.rmtree(root)
        os.replace(made, root)
    return root


def _check_settings(**settings: tuple[int, int]) -> None:
    for name, (value, smallest) in settings.items():
        if (
            not isinstance(value, Integral)
            or isinstance(value, bool)
            or value < smallest
        ):
            raise ValueError(
                f'{name} must be a whole number of at least {smallest}, got {value!r}.'
            )


def _read_meta(root: Path) -> dict:
    try:
        meta = json.loads(root.joinpath('meta.json').read_text('utf-8'))
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _check_replaceable(root: Path, meta: dict, overwrite: bool) -> None:
    """Refuse to delete files that somebody may still need."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return
    found = _read_meta(root)
    if found.get('generator') != meta['generator']:
        raise FileExistsError(
            f'{root} exists and was not made by this generator, so it is '
            'left alone. Choose another root, or remove it yourself.'
        )
    if found != meta and not overwrite:
        raise FileExistsError(
            f'{root} contains a data set of version {found.get("version")} with '
            f'the settings {found.get("settings")}; requested is version '
            f'{meta["version"]} with {meta["settings"]}. Pass overwrite=True '
            '(--overwrite) to replace it, or choose another root.'
        )
