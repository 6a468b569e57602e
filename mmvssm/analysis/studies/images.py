"""The images of a study: files, folders, or a few that are made here."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from mmvssm.analysis.contact_sheet import evenly_spaced
from mmvssm.datasets.photos import load_regions
from mmvssm.datasets.scenes import (
    BACKGROUND,
    OBJECT_CLASSES,
    random_object_scene,
    random_scene,
)
from mmvssm.engine import UsageError
from mmvssm.engine.inference.infer import find_images


@dataclass(frozen=True)
class StudyImage:
    """An image in the size of the study.

    Attributes:
        name: For tables and files; different for each image.
        pixels: RGB, uint8 (H, W, 3).
        mask: Whether a pixel belongs to an object, bool (H, W); None if not known.
        label: Number of its class; None if not known.
    """

    name: str
    pixels: np.ndarray
    mask: np.ndarray | None = None
    label: int | None = None


class ImageSource(ABC):
    """Images that are read or made one at a time, in any size.

    Attributes:
        classes: Names of the classes that labels count; empty without labels.
        labels: Number of the class of each image; empty without labels.
    """

    classes: Sequence[str] = ()
    labels: Sequence[int] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int, size: tuple[int, int]) -> StudyImage:
        """One image, cut to an aspect ratio and resized to height and width."""

    def label(self, index: int) -> int | None:
        """The label of an image, if there are labels."""
        return self.labels[index] if self.labels else None


class FileImages(ImageSource):
    """Image files.

    Args:
        paths: The files.
        masks: A file for each of them; pixels of a value in ``background`` are no
            object.
        background: Values of masks.
        labels, classes: See :class:`ImageSource`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        masks: Sequence[Path] = (),
        background: Sequence[int] = (0,),
        labels: Sequence[int] = (),
        classes: Sequence[str] = (),
    ):
        self.paths, self.masks, self.background = list(paths), list(masks), background
        self.labels, self.classes = labels, classes

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int, size: tuple[int, int]) -> StudyImage:
        """See :meth:`ImageSource.load`; raises UsageError for a file that is bad."""
        path = self.paths[index]
        picture = _read(path).convert('RGB')
        pixels = _fit(picture, size, Image.Resampling.BICUBIC)
        return StudyImage(
            f'{index}_{path.stem}',
            np.array(pixels),
            self._mask(index, picture.size, size),
            self.label(index),
        )

    def _mask(
        self, index: int, whole: tuple[int, int], size: tuple[int, int]
    ) -> np.ndarray | None:
        if not self.masks:
            return None
        mask = _read(self.masks[index])
        if mask.size != whole:
            raise UsageError(
                f'{self.masks[index]} is {mask.width}x{mask.height} pixels, and its '
                f'image {self.paths[index]} {whole[0]}x{whole[1]}.'
            )
        if mask.mode not in ('L', 'P', '1', 'I', 'I;16'):
            raise UsageError(
                f'{self.masks[index]} is a {mask.mode} image; a mask has one channel.'
            )
        values = np.asarray(_fit(mask, size, Image.Resampling.NEAREST))
        return ~np.isin(values, list(self.background))


class OwnImages(ImageSource):
    """Scenes of textured shapes over photographs, those of the quickstart.

    Args:
        count: Number of images.
        seed: The same seed gives the same images.
        labelled: One large object an image, whose class is the label. Otherwise three
            to five objects.
    """

    def __init__(self, count: int, seed: int = 0, labelled: bool = False):
        self.count, self.seed = count, seed
        if labelled:
            self.classes = [kind.name for kind in OBJECT_CLASSES]
            self.labels = [index % len(self.classes) for index in range(count)]

    def __len__(self) -> int:
        return self.count

    @cached_property
    def _regions(self):
        try:
            return load_regions('validation')
        except ImportError as error:
            raise UsageError(
                'without --images or --data, images are made from the photographs of '
                'scikit-image, which is not installed: run `pip install scikit-image`, '
                'or give images.'
            ) from error

    def load(self, index: int, size: tuple[int, int]) -> StudyImage:
        """See :meth:`ImageSource.load`."""
        rng = np.random.default_rng((self.seed, index))
        label = self.label(index)
        if label is None:
            scene = random_scene(self._regions, *size, rng)
        else:
            category = label + BACKGROUND + 1
            scene = random_object_scene(category, self._regions, *size, rng)
        pixels = (scene.image() * 255).round().astype(np.uint8)
        mask = scene.visible_coverage()[0] < 0.5
        return StudyImage(f'scene_{index}', pixels, mask, label)


def open_images(
    images: Sequence[str] | None,
    data: str | None,
    count: int,
    seed: int = 0,
    masks: Sequence[str] | None = None,
    background: Sequence[int] = (0,),
    labelled: bool = False,
) -> ImageSource:
    """The images that the command line names.

    Args:
        images: Files, folders and patterns of ``--images``.
        data: Folder of ``--data``. Where it has one folder for each class, images get
            labels.
        count: With ``data`` at most so many images, evenly spaced; 0 for all.
            Without either, so many are made.
        seed: Of the images that are made.
        masks: ``--masks``: a folder with a PNG of the same name for each image, or as
            many files as images.
        background: Values of masks that are no object.
        labelled: Whether the study needs labels.

    Raises:
        UsageError: There are no such images, masks or class folders.
    """
    if masks and not (images or data):
        raise UsageError('--masks needs --images or --data.')
    if not (images or data):
        return OwnImages(count, seed, labelled)
    labels, classes = [], []
    if data:
        paths, labels, classes = _class_folders(Path(data))
        if labelled and not classes:
            inside = Path(data, 'train')
            hint = f' Is it {inside}?' if inside.is_dir() else ''
            raise UsageError(
                f'{data} has no class folders: this study needs one folder of images '
                f'for each class, two classes at least.{hint}'
            )
        if count:
            chosen = evenly_spaced(len(paths), count)
            paths = [paths[i] for i in chosen]
            labels = [labels[i] for i in chosen] if labels else []
    elif labelled:
        raise UsageError('this study needs labels: give --data in place of --images.')
    else:
        paths = find_images(images)
    return FileImages(paths, _find_masks(masks, paths), background, labels, classes)


def _class_folders(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    if not folder.is_dir():
        raise UsageError(f'no folder {folder.absolute()}.')
    paths = find_images([str(folder)])
    places = [path.relative_to(folder).parts for path in paths]
    classes = sorted({place[0] for place in places if len(place) == 2})
    if len(classes) < 2 or any(len(place) != 2 for place in places):
        return paths, [], []
    number = {name: index for index, name in enumerate(classes)}
    return paths, [number[place[0]] for place in places], classes


def _find_masks(masks: Sequence[str] | None, paths: Sequence[Path]) -> list[Path]:
    if not masks:
        return []
    if len(masks) == 1 and Path(masks[0]).is_dir():
        found = [Path(masks[0], f'{path.stem}.png') for path in paths]
    else:
        found = [Path(mask) for mask in masks]
    if len(found) != len(paths):
        raise UsageError(
            f'--masks names {len(found)} files for {len(paths)} images: give one for '
            'each, or a folder.'
        )
    for mask in found:
        if not mask.is_file():
            raise UsageError(f'no mask at {mask.absolute()}.')
    return found


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture.copy()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f'{path} cannot be read as an image: {error}') from error


def _fit(
    picture: Image.Image, size: tuple[int, int], how: Image.Resampling
) -> Image.Image:
    """Resize so that the size is filled, and cut off what is too much on both sides."""
    height, width = size
    scale = max(height / picture.height, width / picture.width)
    # Rounding must not put the box beyond the border.
    high = min(height / scale, picture.height)
    wide = min(width / scale, picture.width)
    left, top = (picture.width - wide) / 2, (picture.height - high) / 2
    box = (left, top, left + wide, top + high)
    return picture.resize((width, height), how, box=box)
