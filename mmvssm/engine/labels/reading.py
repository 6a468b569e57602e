"""Read images and labels as a config does, before they are cropped or resized."""

import contextlib
import copy
import io
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.fileio import get
from mmengine.registry import DATASETS, TRANSFORMS
from PIL import Image

from .report import DatasetReport, registered

# Transforms of other packages run as well: they may change labels.
_KNOWN_PACKAGES = ('mmcv', 'mmdet', 'mmengine', 'mmseg', 'mmpretrain')
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
ORIENTATION = 0x0112
# Files of a data set that are named one by one.
_MOST_UNREADABLE = 5


class UnreadableError(Exception):
    """An image or its labels cannot be read; the message says which and why."""


@dataclass
class Sample:
    """One image with its labels.

    Attributes:
        path (str): The image.
        image (numpy.ndarray): As loaded, (H, W) or (H, W, C).
        mask_path (str): The mask; empty without one.
        stored (numpy.ndarray | None): The numbers in the mask file.
        labels (numpy.ndarray | None): What the transforms make of them.
        results (dict): All that the transforms have made.
    """

    path: str
    image: np.ndarray
    mask_path: str = ''
    stored: np.ndarray | None = None
    labels: np.ndarray | None = None
    results: dict = field(default_factory=dict)


class Reader:
    """A data set with those transforms that read images and labels.

    Random crops, resizing and the like are left out, so that every pixel of the
    annotation counts. Loading and transforms that are neither mmcv's nor mmseg's or
    mmdet's run in their order.

    Args:
        config (dict): Of the data set, not of a wrapper.
    """

    def __init__(self, config: dict):
        config = copy.deepcopy(config)
        pipeline = list(_reading(config.get('pipeline') or []))
        config['pipeline'] = []
        # pycocotools prints.
        with contextlib.redirect_stdout(io.StringIO()):
            self.dataset = _build(config)
            self.transforms = [TRANSFORMS.build(part) for part in pipeline]
        self.backend_args = config.get('backend_args')

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def is_local(self) -> bool:
        """Whether files are on a disk of this machine."""
        return (self.backend_args or {}).get('backend', 'local') == 'local'

    def read(self, index: int) -> Sample:
        """Read one image with its labels.

        Raises:
            UnreadableError: A file is missing or broken, or does not fit a transform.
        """
        results: Any = self.dataset.get_data_info(index)
        path, mask = results.get('img_path', ''), results.get('seg_map_path')
        for transform in self.transforms:
            try:
                results = transform(results)
            except Exception as error:
                # Decoders fail in any way.
                raise UnreadableError(_why(transform, path, mask, error)) from error
            if results is None:
                raise UnreadableError(f'{path} cannot be read as an image.')
        if results.get('img') is None:
            raise UnreadableError(f'{path}: the pipeline loads no image.')
        sample = Sample(path, np.asarray(results['img']), results=results)
        if results.get('gt_seg_map') is not None and mask:
            sample.mask_path = mask
            sample.labels = np.asarray(results['gt_seg_map'])
            sample.stored = self._stored(mask)
        return sample

    def _stored(self, path: str) -> np.ndarray | None:
        import mmcv

        backend = next(
            (
                transform.imdecode_backend
                for transform in self.transforms
                if type(transform).__name__ == 'LoadAnnotations'
            ),
            None,
        )
        if backend is None:
            return None
        content = get(path, backend_args=self.backend_args)
        found = mmcv.imfrombytes(content, flag='unchanged', backend=backend)
        return None if found is None else np.asarray(found).squeeze()

    def infos(self) -> Iterator[dict]:
        """What the data set knows of every image; not to be changed."""
        if getattr(self.dataset, 'data_list', None):
            return iter(self.dataset.data_list)
        return (self.dataset.get_data_info(index) for index in range(len(self)))


def missing_files(reader: Reader) -> dict[str, list[tuple[int, str, str]]]:
    """Images and masks that the data set names and that are not there.

    Returns:
        Number, image and mask of each, under ``'image'`` or ``'mask'``.
    """
    found: dict[str, list[tuple[int, str, str]]] = {'image': [], 'mask': []}
    if not reader.is_local:
        return found
    # One look into a folder is quicker than one at each file.
    folders: dict[str, set[str]] = {}

    def is_there(path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in folders:
            try:
                folders[folder] = set(os.listdir(folder or '.'))
            except OSError:
                folders[folder] = set()
        return name in folders[folder]

    for index, info in enumerate(reader.infos()):
        image, mask = info.get('img_path') or '', info.get('seg_map_path') or ''
        if '://' in image:
            return found
        if image and not is_there(image):
            found['image'].append((index, image, mask))
        if mask and not is_there(mask):
            found['mask'].append((index, image, mask))
    return found


def report_missing_images(
    reader: Reader, report: DatasetReport, remedy: str
) -> set[int]:
    """Report the images that are not there in one finding.

    Args:
        reader: Of the data set.
        report: The finding is added to it.
        remedy: What to do other than to add the image.

    Returns:
        Their numbers.
    """
    missing = missing_files(reader)['image']
    if missing:
        index, image, _ = missing[0]
        more = f', and {len(missing) - 1} more' if len(missing) > 1 else ''
        report.add(
            'error',
            f'{image} of {report.labels} is missing{more}: add it, or {remedy}.',
            index,
        )
    return {index for index, *_ in missing}


def read_samples(
    reader: Reader,
    report: DatasetReport,
    look: Callable[[int, Sample], None],
    gone: Collection[int] = (),
    images: int | None = None,
    seconds: float | None = None,
    suffices: Callable[[], bool] = lambda: True,
    what: str = 'images',
) -> None:
    """Read images of a data set, and count their sizes and channels.

    Args:
        reader: Of the data set.
        report: Counts, and files that cannot be read, are added to it.
        look: Gets the number of each image and its sample. It may raise
            :class:`UnreadableError`.
        gone: Numbers of images that are not to be read.
        images: How many to read, None for all.
        seconds: The time limit.
        suffices: Whether ``images`` are enough. If not, and if there is a time limit,
            others are read until it is reached.
        what: What is read, for the message.
    """
    end = time.monotonic() + seconds if seconds else None
    unreadable = 0
    for position, index in enumerate(sample_order(len(reader), images)):
        enough = images is not None and position >= images
        if enough and (end is None or suffices()):
            break
        if position and end and time.monotonic() > end:
            break
        if index in gone:
            continue
        try:
            sample = reader.read(index)
            height, width, *channels = sample.image.shape
            report.sizes[f'{height}x{width}'] += 1
            report.channels[channels[0] if channels else 1] += 1
            look(index, sample)
            report.read += 1
        except UnreadableError as error:
            unreadable += 1
            if unreadable <= _MOST_UNREADABLE:
                report.add('error', str(error), index)
    if unreadable > _MOST_UNREADABLE:
        report.add('error', f'{unreadable} {what} of {report.labels} in all.')


def unused_images(folder: str, suffix: str) -> list[str]:
    """Images in a folder that do not end in ``suffix``."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [
        name
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.endswith(suffix)
    ]


def size_remedy(sample: Sample, size: tuple[int, ...], otherwise: str) -> str:
    """What to do where an image has another size than its labels.

    Args:
        sample: With the image.
        size: Height and width of the labels.
        otherwise: What to do if no reason is found.
    """
    if sample.image.shape[1:] == size:
        return 'its bands come first, so write the image anew with the bands last.'
    if size == sample.image.shape[1::-1] and is_rotated(sample.path):
        return (
            'the image says in its EXIF data that it is to be turned: set '
            "color_type='color_ignore_orientation' of LoadImageFromFile, in every "
            'pipeline.'
        )
    return otherwise


def is_rotated(path: str) -> bool:
    """Whether an image file says that it is to be turned before it is looked at."""
    try:
        with Image.open(path) as image:
            return image.getexif().get(ORIENTATION, 1) != 1
    except (OSError, ValueError):
        return False


def sample_order(number: int, most: int | None) -> list[int]:
    """Numbers of images: ``most`` of them evenly spaced, then all others.

    Each part in an order that is the same at every call and favours no place of the
    data set, because reading may stop at any time.
    """
    rng = np.random.default_rng(0)
    count = number if most is None else min(most, number)
    first = np.unique(np.linspace(0, number - 1, count).round().astype(int))
    rest = np.setdiff1d(np.arange(number), first)
    return [*map(int, rng.permutation(first)), *map(int, rng.permutation(rest))]


def _build(config: dict) -> Any:
    try:
        # What is serialized must not be empty.
        return DATASETS.build({**config, 'serialize_data': False})
    except TypeError:
        # A class of the user's need not take it.
        return DATASETS.build(config)


def _reading(pipeline: Any) -> Iterator[dict]:
    for part in pipeline:
        if isinstance(part, (list, tuple)):
            yield from _reading(part[:1])
        if not isinstance(part, dict):
            continue
        kind = part.get('type')
        name = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
        name = name.rpartition('.')[2]
        if name == 'TestTimeAug':
            for choices in part.get('transforms', []):
                yield from _reading(choices[:1])
        elif name.startswith(('LoadImage', 'LoadAnnotations')) or _is_foreign(kind):
            yield part


def _is_foreign(kind: Any) -> bool:
    found = registered(TRANSFORMS, kind)
    if found is None:
        return True  # Building it says that nothing has this name.
    package = getattr(found, '__module__', 'mmcv').partition('.')[0]
    return package not in _KNOWN_PACKAGES


def _why(transform: Any, image: str, mask: str | None, error: Exception) -> str:
    name = type(transform).__name__
    if not name.startswith('LoadAnn'):
        is_loading = name.startswith('Load')
        if is_loading and Path(image).is_file() and not Path(image).stat().st_size:
            return f'{image} cannot be read: the file is empty.'
        return (
            f'{image} cannot be read{"" if is_loading else f" by {name}"}: {error!r}.'
        )
    if isinstance(error, KeyError) and error.args == ('seg_map_path',):
        return (
            f'{image} has no mask, but the pipeline has LoadAnnotations: set '
            'data_prefix.seg_map_path of the data set.'
        )
    if isinstance(error, AssertionError) and 'reduce_zero_label' in str(error):
        return (
            f'{mask or image}: reduce_zero_label of LoadAnnotations is not that of the '
            'data set: leave it out of LoadAnnotations and set it on the data set.'
        )
    if mask and Path(mask).suffix:
        return f'{mask}, the mask of {image}, cannot be read: {error!r}.'
    return f'the annotations of {image} cannot be read: {error!r}.'
