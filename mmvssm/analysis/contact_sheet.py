"""A picture of the predictions of a segmentor."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from mmengine.dataset import pseudo_collate

from mmvssm.analysis.pictures import load_picture, save_figure

IGNORED = 255
IGNORED_COLOUR = (255, 255, 255)
PANEL_INCHES = 2.0


def write_contact_sheet(
    path: str | os.PathLike,
    images: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    max_rows: int = 12,
) -> Path:
    """Draw image, truth and prediction side by side, one sample in each row.

    Args:
        path (str | os.PathLike): The PNG file to write.
        images (Sequence[numpy.ndarray]): RGB images, uint8 (H, W, 3).
        truths (Sequence[numpy.ndarray]): True labels, integers (H, W) in
            [0, K), or 255 where a pixel is ignored.
        predictions (Sequence[numpy.ndarray]): Predicted labels, likewise.
        classes (Sequence[str]): The K names.
        palette (Sequence[Sequence[int]]): K RGB colours in [0, 255].
        max_rows (int): The most samples to draw. If there are more, evenly spaced ones
            are drawn. Defaults to 12.

    Returns:
        pathlib.Path: The file written.

    Raises:
        ValueError: If the samples, the classes and the palette do not fit
            together.
    """
    _check_samples(images, truths, predictions, classes, palette, max_rows)
    chosen = evenly_spaced(len(images), max_rows)
    figure = Figure(
        figsize=(3 * PANEL_INCHES, (len(chosen) + 0.6) * PANEL_INCHES),
        layout='constrained',
    )
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)
    panels = figure.subplots(len(chosen), 3, squeeze=False)
    for panel, title in zip(panels[0], ('image', 'truth', 'prediction')):
        panel.set_title(title, fontsize=11, fontweight='bold')
    for row, index in zip(panels, chosen):
        truth, prediction = truths[index], predictions[index]
        row[0].imshow(images[index])
        row[1].imshow(_colourise(truth, palette), interpolation='nearest')
        row[2].imshow(_colourise(prediction, palette), interpolation='nearest')
        labelled = truth != IGNORED
        if labelled.any():
            right = (truth == prediction)[labelled].mean()
            row[2].set_xlabel(f'{right:.1%} of the pixels right', fontsize=8)
        for panel in row:
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
    names = [*classes, 'ignored']
    colours = [*palette, IGNORED_COLOUR]
    figure.legend(
        handles=[
            Patch(facecolor=np.divide(colour, 255), edgecolor='0.6', label=name)
            for name, colour in zip(names, colours)
        ],
        loc='outside lower center',
        ncols=3,
        fontsize=9,
        frameon=False,
    )
    return save_figure(figure, path)


def write_model_contact_sheet(
    path: str | os.PathLike, model, dataset, max_rows: int = 12
) -> Path:
    """Run a segmentor on evenly spaced samples, and draw its predictions.

    With a finished ``mmengine`` runner: ``write_model_contact_sheet(path,
    runner.model, runner.test_dataloader.dataset)``.

    Args:
        path (str | os.PathLike): The PNG file to write.
        model (mmseg.models.BaseSegmentor): The segmentor. Its mode (training or
            evaluation) does not change.
        dataset (mmseg.datasets.BaseSegDataset): A data set with a test
            pipeline that loads annotations.
        max_rows (int): The most samples to draw. Defaults to 12.

    Returns:
        pathlib.Path: The file written.
    """
    images, truths, predictions = [], [], []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for index in evenly_spaced(len(dataset), max_rows):
            (sample,) = model.test_step(pseudo_collate([dataset[int(index)]]))
            images.append(load_picture(sample.img_path, dataset))
            truths.append(_label_map(sample.gt_sem_seg))
            predictions.append(_label_map(sample.pred_sem_seg))
    model.train(was_training)
    return write_contact_sheet(
        path,
        images,
        truths,
        predictions,
        dataset.metainfo['classes'],
        dataset.metainfo['palette'],
        max_rows,
    )


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """Indices of at most ``most`` of ``count`` samples, evenly spaced."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def _label_map(pixel_data) -> np.ndarray:
    return pixel_data.data.squeeze(0).cpu().numpy()


def _colourise(labels: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    table = np.full((256, 3), IGNORED_COLOUR, dtype=np.uint8)
    table[: len(palette)] = palette
    return table[labels]


def _check_samples(images, truths, predictions, classes, palette, max_rows) -> None:
    counts = len(images), len(truths), len(predictions)
    if len(set(counts)) > 1 or counts[0] == 0:
        raise ValueError(
            'A contact sheet needs as many images as truths and '
            f'predictions, at least one; got {counts}.'
        )
    if len(classes) != len(palette):
        raise ValueError(
            f'{len(classes)} classes need as many colours, the '
            f'palette has {len(palette)}.'
        )
    if max_rows < 1:
        raise ValueError(f'max_rows must be at least 1, got {max_rows}.')
    for index, maps in enumerate(zip(images, truths, predictions)):
        shapes = [np.shape(item)[:2] for item in maps]
        if len(set(shapes)) > 1:
            raise ValueError(
                f'Image, truth and prediction of sample {index} '
                f'differ in height or width: {shapes}.'
            )
        for labels in maps[1:]:
            if not np.isin(labels, [*range(len(classes)), IGNORED]).all():
                raise ValueError(
                    f'Sample {index} has labels outside 0..'
                    f'{len(classes) - 1} and {IGNORED} (ignored): '
                    f'{np.unique(labels).tolist()}.'
                )
