"""Segment image files."""

import copy
import glob
from collections.abc import Iterable
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmseg.apis import inference_model, init_model
from mmseg.registry import DATASETS
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer
from PIL import Image
from torch import nn

from .errors import UsageError
from .weights import load_weights

_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


def find_images(patterns: Iterable[str]) -> list[Path]:
    """Expand files, folders (recursively) and glob patterns, sorted.

    A plain name is kept even if there is no such file, so that it is
    reported with the images that cannot be read.

    Raises:
        UsageError: A folder or a pattern holds no image.
    """
    found = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            here = [p for p in path.rglob('*') if p.suffix.lower() in _SUFFIXES]
        elif glob.has_magic(pattern) and not path.exists():
            here = map(Path, glob.glob(pattern, recursive=True))
        else:
            here = [path]
        here = sorted(here)
        if not here:
            raise UsageError(f'no image in {pattern}.')
        found.update(dict.fromkeys(here))
    return list(found)


def free_name(path: Path, taken: set[str]) -> str:
    """A name for the results of ``path`` that no other image has.

    ``taken`` collects the names; images of the same name in several folders
    become NAME, NAME_2, NAME_3.
    """
    name, number = path.stem, 1
    while name in taken:
        number += 1
        name = f'{path.stem}_{number}'
    taken.add(name)
    return name


def load_segmentor(
    cfg: Config, checkpoint: str, device: str | None = None
) -> nn.Module:
    """Build the segmentor of a config and fill it from its checkpoint.

    Args:
        cfg: A config of mmseg's.
        checkpoint: Loaded by :func:`mmvssm.engine.load_weights`.
        device: By default the accelerator, if the machine has one.

    Returns:
        The model in eval mode, with ``cfg`` and ``dataset_meta`` attached as
        ``mmseg.apis.inference_model`` expects.

    Raises:
        UsageError: There is no such device, or the checkpoint does not belong to
            the model.
    """
    device = device or get_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f'cannot use the device {device!r}: {str(error).splitlines()[0]}'
        ) from error
    cfg = copy.deepcopy(cfg)
    cfg.setdefault('test_pipeline', cfg.test_dataloader.dataset.pipeline)
    model = revert_sync_batchnorm(init_model(cfg, device=device))
    load_weights(model, checkpoint)
    # Knows classes and palette without a look at its files.
    dataset = DATASETS.build(dict(cfg.test_dataloader.dataset, lazy_init=True))
    model.dataset_meta = dataset.metainfo
    return model.eval()


def segment_file(model: nn.Module, path: Path) -> tuple[np.ndarray, SegDataSample]:
    """Read and segment one image.

    Returns:
        The image (H, W, 3), BGR, and the prediction at its size.

    Raises:
        OSError: The file is missing, cut short or not an image.
    """
    with Image.open(path) as picture:
        # OpenCV would take a file that is cut short, and fill up with grey.
        picture.load()
    image = mmcv.imread(str(path))
    if image is None:
        raise OSError(f'{path} is not an image that OpenCV reads')
    return image, inference_model(model, image)


def save_overlay(
    model: nn.Module, image: np.ndarray, prediction: SegDataSample, path: Path
) -> None:
    """Write the image with the predicted classes painted over it."""
    painter = SegLocalVisualizer(alpha=0.6)
    painter.dataset_meta = model.dataset_meta
    painter.add_datasample(
        path.stem, image[..., ::-1], prediction, draw_gt=False, out_file=str(path)
    )


def save_label_map(model: nn.Module, prediction: SegDataSample, path: Path) -> None:
    """Write class numbers, counted from 0, as a PNG in the palette's colours.

    The pixel values are the class numbers; 16 bits and grey beyond 256
    classes.
    """
    labels = prediction.pred_sem_seg.data[0].cpu().numpy()
    palette = np.asarray(model.dataset_meta['palette'], np.uint8)
    if len(palette) > 256:
        Image.fromarray(labels.astype(np.uint16)).save(path)
        return
    picture = Image.fromarray(labels.astype(np.uint8))
    picture.putpalette(palette.tobytes())
    picture.save(path)
