"""What a model of either task needs to predict image files."""

import copy
import glob
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from PIL import Image
from torch import nn

from mmvssm.engine.checkpoints.weights import load_weights
from mmvssm.engine.configs.config import is_detector
from mmvssm.engine.errors import UsageError
from mmvssm.engine.inference.labels_only import leave_out_logits

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


def choose_task(cfg: Config) -> ModuleType:
    """What to do with an image by a config's model.

    Returns:
        The module ``detect`` or ``segment`` of this folder: each has
        ``predict(model, image)``, ``save(model, image, prediction, path)`` and
        ``VERB``. Only the toolbox of the task is imported.
    """
    if is_detector(cfg):
        from . import detect as task
    else:
        from . import segment as task
    return task


def load_model(
    cfg: Config,
    checkpoint: str,
    device: str | None = None,
    weights: str | None = None,
) -> nn.Module:
    """Build the model of a config and fill it from its checkpoint.

    Args:
        cfg: A config of mmseg's or mmdet's.
        checkpoint: Loaded by :func:`mmvssm.engine.load_weights`.
        device: By default the accelerator, if the machine has one.
        weights: ``'raw'`` or ``'ema'``, of a file with both.

    Returns:
        The model in eval mode, with ``cfg`` and ``dataset_meta`` attached as
        the toolboxes' functions for inference expect. A segmentor of mmseg's kinds
        predicts labels without logits, see :func:`mmvssm.engine.labels_only`.

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
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    cfg.model.backbone.pop('init_cfg', None)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).to(device)
    load_weights(model, checkpoint, weights)
    # Knows classes and palette without a look at its files.
    dataset = DATASETS.build(dict(cfg.test_dataloader.dataset, lazy_init=True))
    model.cfg, model.dataset_meta = cfg, dataset.metainfo
    leave_out_logits(model)
    return model.eval()


def read_image(path: Path) -> np.ndarray:
    """Read an image (H, W, 3), BGR, whatever its mode is.

    Raises:
        OSError: The file is missing, cut short or not an image.
    """
    with Image.open(path) as picture:
        # OpenCV would take a file that is cut short, and fill up with grey.
        picture.load()
    image = mmcv.imread(str(path))
    if image is None:
        raise OSError(f'{path} is not an image that OpenCV reads')
    return image
