"""A small segmentation data set in ADE20K's folder layout.

::

    root/
      images/{training,validation}/*.jpg
      annotations/{training,validation}/*.png   0 unlabelled, 1..K classes
      meta.json                                 classes, palette, settings
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from numbers import Integral
from pathlib import Path

import numpy as np
from PIL import Image

from mmvssm.datasets.photos import SPLITS, PhotoRegion, load_regions
from mmvssm.datasets.scenes import OBJECT_CLASSES, random_scene

QUICKSTART_CLASSES = ('background', *(kind.name for kind in OBJECT_CLASSES))
QUICKSTART_PALETTE = (
    [70, 75, 85],
    [86, 180, 233],
    [0, 90, 181],
    [240, 228, 66],
    [213, 94, 0],
    [0, 158, 115],
    [204, 121, 167],
    [150, 60, 190],
)
# To be raised whenever the same settings give other files.
GENERATOR = 'mmvssm quickstart data'
GENERATOR_VERSION = 1
SMALLEST_SIZE = 64


def make_quickstart_dataset(
    root: str | os.PathLike,
    num_train: int = 480,
    num_val: int = 96,
    size: int = 128,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[list], Iterable] = iter,
) -> Path:
    """Make the data set, or find it made already.

    Textured shapes lie over photographs that scikit-image ships. A class is
    a shape and a texture; colours, light, pose and scale are drawn alike for
    all of them. The two splits look at disjoint parts of the photographs.
    The files depend on the settings only: the same ones (and the same Pillow
    and scikit-image) give the same bytes. The folder appears under its name
    once it is complete, so an interrupted run leaves nothing half-made.

    Args:
        root (str | os.PathLike): The folder to make.
        num_train (int): Number of training images. Defaults to 480.
        num_val (int): Number of validation images. Defaults to 96.
        size (int): Shorter side of the images in pixels, at least 64. Every
            fourth image has a longer side of 5/4 of it, the others are
            square. Defaults to 128.
        seed (int): Seed of the generator, not negative. Defaults to 0.
        overwrite (bool): Whether a data set of other settings may be
            replaced. Defaults to False.
        progress (Callable): Wraps the list of images to be made, as
            ``tqdm.tqdm`` does. Defaults to iter.

    Returns:
        pathlib.Path: The folder.

    Raises:
        ValueError: If an argument is out of range.
        FileExistsError: If ``root`` holds a data set of other settings and
            ``overwrite`` is False, or holds anything else at all.
        ImportError: If scikit-image is not installed.
    """
    counts = dict(zip(SPLITS, (num_train, num_val)))
    _check_settings(
        num_train=(num_train, 1),
        num_val=(num_val, 1),
        size=(size, SMALLEST_SIZE),
        seed=(seed, 0),
    )
    root = Path(root)
    meta = {
        'generator': GENERATOR,
        'version': GENERATOR_VERSION,
        'classes': list(QUICKSTART_CLASSES),
        'palette': list(QUICKSTART_PALETTE),
        'settings': {
            'num_train': int(num_train),
            'num_val': int(num_val),
            'size': int(size),
            'seed': int(seed),
        },
    }
    if not overwrite and _is_made(root, meta, counts):
        return root
    _check_replaceable(root, meta, overwrite)

    regions = {split: load_regions(split) for split in SPLITS}
    jobs = [(split, index) for split in SPLITS for index in range(counts[split])]
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=root.parent, prefix=f'.{root.name}-'
    ) as scratch:
        made = Path(scratch, 'made')
        for split in SPLITS:
            made.joinpath('images', split).mkdir(parents=True)
            made.joinpath('annotations', split).mkdir(parents=True)
        for split, index in progress(jobs):
            _write_sample(made, split, index, regions[split], size, seed)
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


def _is_made(root: Path, meta: dict, counts: dict[str, int]) -> bool:
    """Whether the very data set is there, no file of it missing."""
    return _read_meta(root) == meta and all(
        len(list(root.glob(f'{kind}/{split}/*'))) == count
        for split, count in counts.items()
        for kind in ('images', 'annotations')
    )


def _check_replaceable(root: Path, meta: dict, overwrite: bool) -> None:
    """Refuse to delete what somebody may still want."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return
    found = _read_meta(root)
    if found.get('generator') != GENERATOR:
        raise FileExistsError(
            f'{root} exists and was not made by this generator, so it is '
            'left alone. Choose another root, or remove it yourself.'
        )
    if found != meta and not overwrite:
        raise FileExistsError(
            f'{root} holds a data set of version {found.get("version")} with '
            f'the settings {found.get("settings")}, asked for is version '
            f'{meta["version"]} with {meta["settings"]}. Pass overwrite=True '
            '(--overwrite) to replace it, or choose another root.'
        )


def _canvas(index: int, size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Height and width: every fourth image is not square."""
    if index % 4 != 3:
        return size, size
    longer = 5 * size // 4
    return (size, longer) if rng.random() < 0.5 else (longer, size)


def _write_sample(
    root: Path,
    split: str,
    index: int,
    regions: tuple[PhotoRegion, ...],
    size: int,
    seed: int,
) -> None:
    """Write one image as JPEG, with sensor noise, and its labels as PNG."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = random_scene(regions, *_canvas(index, size, rng), rng)
    pixels = scene.image()
    pixels = pixels + rng.normal(0, rng.uniform(0.005, 0.03), pixels.shape)
    pixels = np.clip(pixels * 255 + 0.5, 0, 255).astype(np.uint8)
    name = f'{split}_{index:05d}'
    Image.fromarray(pixels).save(
        root / 'images' / split / f'{name}.jpg', quality=int(rng.integers(75, 96))
    )
    Image.fromarray(scene.label_map()).save(
        root / 'annotations' / split / f'{name}.png'
    )
