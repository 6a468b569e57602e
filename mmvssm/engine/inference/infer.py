"""What a model of any task needs to predict image files."""

import copy
import glob
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from PIL import Image, UnidentifiedImageError
from torch import nn

from mmvssm.analysis.pictures import loads_bgr, to_picture, transforms_of
from mmvssm.checkpoints.read import read_content
from mmvssm.engine.checkpoints.weights import load_weights
from mmvssm.engine.configs.config import is_classifier, is_detector, scope_of
from mmvssm.engine.errors import UsageError
from mmvssm.engine.inference.device import checked_device
from mmvssm.engine.inference.labels_only import leave_out_logits

# What a transform or a model raises of an image that it cannot take. Anything else is a
# bug, and not of the image.
_OF_THE_IMAGE = (
    *(OSError, ValueError, RuntimeError, AssertionError, MemoryError, cv2.error),
)
_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


class ImageError(Exception):
    """One image cannot be predicted; the message says why, in one line."""


class Prediction(NamedTuple):
    """What a model says of an image.

    Attributes:
        picture (numpy.ndarray): The image to paint over, RGB, uint8 (H, W, 3).
        sample: Data sample of the toolbox; a segmentor's and a detector's is for the
            image's own pixels.
    """

    picture: np.ndarray
    sample: Any


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


def choose_task(cfg: Config) -> ModuleType:
    """What to do with an image by a config's model.

    Returns:
        The module ``classify``, ``detect`` or ``segment`` of this folder: each has
        ``save(model, picture, sample, path)``, which may return a text to print, and
        ``VERB``. Only the toolbox of the task is imported.
    """
    if is_classifier(cfg):
        from . import classify as task
    elif is_detector(cfg):
        from . import detect as task
    else:
        from . import segment as task
    return task


def load_model(
    cfg: Config,
    checkpoint: str | None,
    device: str | None = None,
    weights: str | None = None,
) -> nn.Module:
    """Build the model of a config and fill it from its checkpoint.

    Args:
        cfg: A config of mmseg's, mmdet's or mmpretrain's.
        checkpoint: Loaded by :func:`mmvssm.engine.load_weights`. None leaves the random
            weights that a new model has.
        device: By default the accelerator, if the machine has one.
        weights: ``'raw'`` or ``'ema'``, of a file with both.

    Returns:
        The model in eval mode, with ``cfg`` and ``dataset_meta`` attached as
        the toolboxes' functions for inference expect, and ``transforms``, with which
        the config's test reads images. A segmentor of mmseg's kinds predicts labels
        without logits, see :func:`mmvssm.engine.labels_only`.

    Raises:
        UsageError: There is no such device, or the checkpoint or the names of the
            classes do not belong to the model.
    """
    device = checked_device(device)
    cfg = copy.deepcopy(cfg)
    cfg.setdefault('test_pipeline', cfg.test_dataloader.dataset.pipeline)
    init_default_scope(scope_of(cfg))
    cfg.model.backbone.pop('init_cfg', None)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).to(device)
    if checkpoint is not None:
        load_weights(model, checkpoint, weights)
    # Knows classes, palette and transforms without a look at its files.
    dataset = DATASETS.build(dict(cfg.test_dataloader.dataset, lazy_init=True))
    model.cfg, model.dataset_meta = cfg, dataset.metainfo
    if is_classifier(cfg):
        classes = _classes_of(model, dataset, checkpoint)
        model.dataset_meta = dict(model.dataset_meta, classes=classes)
    model.transforms = [x for x in transforms_of(dataset) if not _loads_labels(x)]
    leave_out_logits(model)
    return model.eval()


def _classes_of(
    model: nn.Module, dataset: Any, checkpoint: str | None
) -> list[str] | None:
    """Names of the classes that a classifier knows.

    Those of the data set. If the names of its folders are its only ones, those that the
    training wrote into the checkpoint, or numbers.
    """
    number = getattr(model.head, 'num_classes', None)
    names = dataset.metainfo.get('classes')
    where = 'metainfo of the test data set has'
    if not names and checkpoint:
        content = read_content(checkpoint)
        meta = content.get('meta') if isinstance(content, dict) else None
        described = (meta or {}).get('dataset_meta') or {}
        names, where = described.get('classes'), f'{checkpoint} names'
    if not names:
        return [str(i) for i in range(number or 0)]
    if number not in (None, len(names)):
        raise UsageError(
            f'{where} {len(names)} classes, and the model knows {number}: set '
            'metainfo=dict(classes=...) of test_dataloader.dataset to their names.'
        )
    return list(names)


def _loads_labels(transform: Any) -> bool:
    name = type(transform).__name__
    return name.startswith('Load') and name.endswith('Annotations')


def predict(model: nn.Module, path: Path) -> Prediction:
    """Predict an image file, read and prepared as the config's test does it.

    Args:
        model: Of :func:`load_model`.
        path: The file.

    Raises:
        ImageError: It is missing, cut short or no image, or a transform or the model
            does not take it. What is not the image's fault is raised as it is.
    """
    load, *others = model.transforms
    results = _load(load, path)
    image = np.array(results['img'])
    for transform in others:
        results = _transform(transform, results, image)
    try:
        with torch.no_grad():
            (sample,) = model.test_step(pseudo_collate([results]))
    except _OF_THE_IMAGE as error:
        raise ImageError(_first_line(error)) from error
    return Prediction(to_picture(image, loads_bgr(load)), sample)


def _load(load: Callable[[dict], dict | None], path: Path) -> dict:
    """What the transform that loads images makes of a file."""
    try:
        if getattr(load, 'imdecode_backend', None) != 'tifffile':
            _refuse_cut_file(path)
        results = load(dict(img_path=str(path), img_id=0))
    except Exception as error:
        # Decoders fail in any way.
        raise ImageError(_first_line(error)) from error
    if results is None or results.get('img') is None:
        raise ImageError('it cannot be read as an image')
    return results


def _transform(
    transform: Callable[[dict], dict | None], results: dict, image: np.ndarray
) -> dict:
    try:
        found = transform(results)
    except _OF_THE_IMAGE as error:
        height, width, *channels = image.shape
        raise ImageError(
            f'{type(transform).__name__} cannot take an image of {width}x{height} '
            f'pixels, {channels[0] if channels else 1} channels and {image.dtype}: '
            f'{_first_line(error)}'
        ) from error
    if found is None:
        raise ImageError(f'{type(transform).__name__} leaves it out')
    return found


def _refuse_cut_file(path: Path) -> None:
    """Raise OSError for a file that is cut short, where Pillow knows its format.

    OpenCV would take it, and fill up with grey. And for one without content.
    """
    if not path.stat().st_size:
        raise OSError('the file is empty')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', Image.DecompressionBombWarning)
        try:
            with Image.open(path) as picture:
                picture.load()
        except (UnidentifiedImageError, Image.DecompressionBombError):
            # Another one may read it.
            return


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
