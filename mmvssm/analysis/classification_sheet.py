"""Pictures of the predictions of a classifier."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.dataset import pseudo_collate

from mmvssm.analysis.contact_sheet import PANEL_INCHES, evenly_spaced
from mmvssm.analysis.pictures import load_picture, save_figure

COLUMNS = 6
# Blue and vermilion differ for every eye; the marks say the same without colour.
RIGHT, WRONG = '#0072b2', '#d55e00'
# Of more classes, names and numbers could not be read.
MOST_NAMED = 40


def write_classification_sheet(
    path: str | os.PathLike,
    images: Sequence[np.ndarray],
    truths: Sequence[int],
    predictions: Sequence[int],
    scores: Sequence[float],
    classes: Sequence[str],
) -> Path:
    """Draw images, each with its true class above and the predicted one below.

    Args:
        path (str | os.PathLike): The PNG file to write.
        images (Sequence[numpy.ndarray]): RGB images, uint8 (H, W, 3).
        truths (Sequence[int]): Numbers of the true classes, in [0, K).
        predictions (Sequence[int]): Numbers of the predicted classes.
        scores (Sequence[float]): Probabilities of the predicted classes, in [0, 1].
        classes (Sequence[str]): The K names.

    Returns:
        pathlib.Path: The file written.

    Raises:
        ValueError: If there are not as many truths, predictions and scores as images,
            or no images.
    """
    counts = len(images), len(truths), len(predictions), len(scores)
    if len(set(counts)) > 1 or counts[0] == 0:
        raise ValueError(
            'A classification sheet needs as many images as truths, predictions and '
            f'scores, at least one; got {counts}.'
        )
    rows = -(-len(images) // COLUMNS)
    figure = Figure(
        figsize=(COLUMNS * PANEL_INCHES, rows * (PANEL_INCHES + 0.6) + 0.3),
        layout='constrained',
    )
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.06, hspace=0.06)
    panels = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for panel in panels[len(images) :]:
        panel.set_visible(False)
    for panel, image, truth, found, score in zip(
        panels, images, truths, predictions, scores
    ):
        right = truth == found
        panel.imshow(image)
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
        panel.set_title(classes[truth], fontsize=9)
        panel.set_xlabel(
            f'{"✓" if right else "✗"} {classes[found]} {score:.0%}',
            fontsize=9,
            color=RIGHT if right else WRONG,
            fontweight='normal' if right else 'bold',
        )
    figure.supxlabel(
        'above: true class; below: predicted class, its probability, '
        '✓ right or ✗ wrong',
        fontsize=9,
    )
    return save_figure(figure, path)


def write_classifier_sheet(
    path: str | os.PathLike, model, dataset, max_images: int = 24
) -> Path:
    """Run a classifier on evenly spaced samples, and draw its predictions.

    With a finished ``mmengine`` runner: ``write_classifier_sheet(path,
    runner.model, runner.test_dataloader.dataset)``.

    Args:
        path (str | os.PathLike): The PNG file to write.
        model (mmpretrain.models.ImageClassifier): The classifier. Its mode (training or
            evaluation) does not change.
        dataset (mmpretrain.datasets.BaseDataset): A data set of image files with one
            label each.
        max_images (int): The most samples to draw. Defaults to 24.

    Returns:
        pathlib.Path: The file written.
    """
    images, truths, predictions, scores = [], [], [], []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for index in evenly_spaced(len(dataset), max_images):
            (sample,) = model.test_step(pseudo_collate([dataset[int(index)]]))
            images.append(load_picture(sample.img_path, dataset))
            truths.append(int(sample.gt_label))
            predictions.append(int(sample.pred_label))
            scores.append(float(sample.pred_score.max()))
    model.train(was_training)
    return write_classification_sheet(
        path, images, truths, predictions, scores, dataset.metainfo['classes']
    )


def write_confusion(
    path: str | os.PathLike, counts: np.ndarray, classes: Sequence[str]
) -> Path:
    """Draw how often each class was taken for each.

    The colour of a cell is its share of the images of its row.

    Args:
        path (str | os.PathLike): The PNG file to write.
        counts (numpy.ndarray): (K, K) numbers of images: rows are true classes,
            columns predicted ones.
        classes (Sequence[str]): The K names. Of more than 40 classes, names and numbers
            are left out.

    Returns:
        pathlib.Path: The file written.

    Raises:
        ValueError: If there is not a row and a column for each class.
    """
    counts = np.asarray(counts)
    if counts.shape != (len(classes), len(classes)):
        raise ValueError(
            f'{len(classes)} classes need as many rows and columns, the matrix is of '
            f'shape {counts.shape}.'
        )
    total = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(total, 1)
    named = len(classes) <= MOST_NAMED
    side = 3.5 + 0.5 * len(classes) if named else 9.0
    figure = Figure(figsize=(side, side - 0.7), layout='constrained')
    panel = figure.subplots()
    drawn = panel.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    bar = figure.colorbar(drawn, ax=panel, shrink=0.8)
    bar.set_label('share of the images of the true class')
    panel.set_xlabel('predicted class')
    panel.set_ylabel('true class')
    if named:
        ticks = range(len(classes))
        panel.set_xticks(
            ticks, classes, rotation=45, ha='right', rotation_mode='anchor'
        )
        panel.set_yticks(ticks, classes)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                panel.text(
                    *(column, row, str(count)),
                    ha='center',
                    va='center',
                    color='white' if shares[row, column] > 0.5 else 'black',
                )
    right = np.trace(counts) / max(counts.sum(), 1)
    panel.set_title(f'{right:.1%} of {counts.sum()} images right', fontsize=11)
    return save_figure(figure, path)
