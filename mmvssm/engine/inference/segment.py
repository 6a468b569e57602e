"""Write the classes that were predicted for an image."""

from pathlib import Path

import numpy as np
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer
from PIL import Image
from torch import nn

VERB = 'segmented'


def save(
    model: nn.Module, picture: np.ndarray, prediction: SegDataSample, path: Path
) -> None:
    """Write ``path`` + ``_overlay.png`` and ``path`` + ``_labels.png``."""
    save_overlay(model, picture, prediction, Path(f'{path}_overlay.png'))
    save_label_map(model, prediction, Path(f'{path}_labels.png'))


def save_overlay(
    model: nn.Module, picture: np.ndarray, prediction: SegDataSample, path: Path
) -> None:
    """Write the picture with the predicted classes painted over it."""
    painter = SegLocalVisualizer(alpha=0.6)
    painter.dataset_meta = model.dataset_meta
    painter.add_datasample(
        path.stem, picture, prediction, draw_gt=False, out_file=str(path)
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
