"""The photographs of scikit-image as a source of backgrounds and colours."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

# Photographs inside the scikit-image wheel: reading them needs no network.
PHOTOS = (
    'astronaut',
    'brick',
    'camera',
    'chelsea',
    'coffee',
    'coins',
    'grass',
    'gravel',
    'immunohistochemistry',
    'rocket',
    'stereo_motorcycle',
)
SPLITS = ('training', 'validation')
TRAINING_SHARE = 0.6


@dataclass(frozen=True)
class PhotoRegion:
    """The part of one photograph that belongs to one split.

    Attributes:
        photo (str): Name of the function of ``skimage.data``.
        box (tuple[int, int, int, int]): Left, top, right, bottom in pixels
            of the photograph, right and bottom exclusive.
        image (PIL.Image.Image): The RGB pixels of the box.
    """

    photo: str
    box: tuple[int, int, int, int]
    image: Image.Image


def _read_photo(name: str) -> Image.Image:
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError(
            'The quickstart data set is made from photographs in '
            'scikit-image, which is not installed. Install '
            'it with `pip install scikit-image`.'
        ) from error
    pixels = getattr(data, name)()
    if isinstance(pixels, tuple):  # A stereo pair: the left view.
        pixels = pixels[0]
    return Image.fromarray(pixels).convert('RGB')


def split_box(
    width: int, height: int, split: str, mirrored: bool
) -> tuple[int, int, int, int]:
    """Divide a photograph between the two splits, across its longer side.

    Args:
        width (int): Width of the photograph in pixels.
        height (int): Height of the photograph in pixels.
        split (str): 'training' or 'validation'.
        mirrored (bool): Whether training gets the right (or lower) part.

    Returns:
        tuple[int, int, int, int]: Left, top, right, bottom of the part. The
        boxes of the two splits share no pixel.
    """
    length = max(width, height)
    cut = round(length * TRAINING_SHARE)
    start, stop = (0, cut) if split == 'training' else (cut, length)
    if mirrored:
        start, stop = length - stop, length - start
    if width >= height:
        return start, 0, stop, height
    return 0, start, width, stop


def load_regions(split: str) -> tuple[PhotoRegion, ...]:
    """Read the regions of all photographs that belong to a split.

    Args:
        split (str): 'training' or 'validation'.

    Returns:
        tuple[PhotoRegion, ...]: One region for every name in ``PHOTOS``.

    Raises:
        ValueError: If there is no such split.
        ImportError: If scikit-image is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f'split must be one of {SPLITS}, got {split!r}.')
    regions = []
    for index, name in enumerate(PHOTOS):
        photo = _read_photo(name)
        box = split_box(*photo.size, split, mirrored=index % 2 == 1)
        regions.append(PhotoRegion(name, box, photo.crop(box)))
    return tuple(regions)


def random_patch(
    regions: tuple[PhotoRegion, ...], height: int, width: int, rng: np.random.Generator
) -> np.ndarray:
    """Cut a random piece of a random region, flip it and shift its colours.

    The colour shift (a permutation of the channels, and a gamma and a gain for each) is
    so large that no colour is typical of one photograph.

    Args:
        regions (tuple[PhotoRegion, ...]): What to choose from.
        height (int): Height of the patch in pixels.
        width (int): Width of the patch in pixels.
        rng (numpy.random.Generator): The only source of randomness.

    Returns:
        numpy.ndarray: float32 of shape (height, width, 3), in [0, 1].
    """
    photo = regions[rng.integers(len(regions))].image
    widest = min(photo.width, photo.height * width / height)
    zoom = rng.uniform(0.45, 1.0)
    crop_width, crop_height = widest * zoom, widest * zoom * height / width
    left = rng.uniform(0, photo.width - crop_width)
    top = rng.uniform(0, photo.height - crop_height)
    patch = photo.resize(
        (width, height),
        Image.Resampling.BILINEAR,
        box=(left, top, left + crop_width, top + crop_height),
    )
    pixels = np.asarray(patch, dtype=np.float32) / 255
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    pixels = pixels[..., rng.permutation(3)]
    gamma = rng.uniform(0.7, 1.4, 3).astype(np.float32)
    gain = rng.uniform(0.75, 1.15, 3).astype(np.float32)
    return np.clip(pixels**gamma * gain, 0, 1)
