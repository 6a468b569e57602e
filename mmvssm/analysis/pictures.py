"""Images of any channels and dtype, as pictures to look at."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def to_picture(image: np.ndarray, bgr: bool = True) -> np.ndarray:
    """What can be drawn of a loaded image.

    The first three channels are drawn; of one or two channels the first, in grey.
    Numbers that are not of 8 bits are stretched from the least to the largest one.
    Numbers that are not finite become 0.

    Args:
        image: (H, W) or (H, W, C), any dtype.
        bgr: Whether the first three channels are blue, green and red.

    Returns:
        RGB, uint8 (H, W, 3).
    """
    if image.ndim == 2:
        image = image[..., None]
    if image.shape[2] < 3:
        image = image[..., :1].repeat(3, 2)
    elif bgr:
        image = image[..., 2::-1]
    else:
        image = image[..., :3]
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    values = np.nan_to_num(image.astype(np.float64), posinf=0, neginf=0)
    low, high = values.min(initial=0), values.max(initial=0)
    if low < 0 or high > 255 or high <= 1:
        low = values.min(initial=high)
        values = (values - low) * (255 / max(high - low, 1e-12))
    return values.round().astype(np.uint8)


def loads_bgr(transform: Any) -> bool:
    """Whether a transform that loads images puts blue first, as OpenCV does."""
    return getattr(transform, 'imdecode_backend', 'cv2') != 'tifffile'


def transforms_of(dataset: Any) -> list[Callable[[dict], Any]]:
    """The transforms of a data set, or of the first one inside of a wrapper."""
    while not hasattr(dataset, 'pipeline'):
        dataset = (
            dataset.datasets[0] if hasattr(dataset, 'datasets') else dataset.dataset
        )
    return list(dataset.pipeline.transforms)


def load_picture(path: str, dataset: Any) -> np.ndarray:
    """The image of a file as a data set loads it, to look at.

    Args:
        path: The file.
        dataset: Of mmseg or mmdet. The first of its transforms loads the image.

    Returns:
        RGB, uint8 (H, W, 3).
    """
    load = transforms_of(dataset)[0]
    return to_picture(np.asarray(load(dict(img_path=path))['img']), loads_bgr(load))


def save_figure(figure: 'Figure', path: str | os.PathLike) -> Path:
    """Write a figure as PNG; its folder is made if it is not there.

    Returns:
        The file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format='png', dpi=110)
    return path
