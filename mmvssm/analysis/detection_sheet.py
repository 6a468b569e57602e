"""A picture of the predictions of a detector."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from mmengine.dataset import pseudo_collate

from mmvssm.analysis.contact_sheet import PANEL_INCHES, evenly_spaced
from mmvssm.analysis.pictures import load_picture, save_figure

MASK_OPACITY = 0.45


@dataclass(frozen=True)
class Objects:
    """The objects of one image, true or predicted.

    Attributes:
        boxes (numpy.ndarray): (n, 4): left, top, right, bottom in pixels.
        masks (numpy.ndarray): (n, H, W), boolean.
        labels (numpy.ndarray): (n,), class numbers from 0.
        scores (numpy.ndarray | None): (n,), in [0, 1]; None of true objects.
    """

    boxes: np.ndarray
    masks: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None


def write_detection_sheet(
    path: str | os.PathLike,
    images: Sequence[np.ndarray],
    truths: Sequence[Objects],
    predictions: Sequence[Objects],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
) -> Path:
    """Draw image, true and predicted boxes and masks, one sample in each row.

    Args:
        path (str | os.PathLike): The PNG file to write.
        images (Sequence[numpy.ndarray]): RGB images, uint8 (H, W, 3).
        truths (Sequence[Objects]): What is in them.
        predictions (Sequence[Objects]): What was found.
        classes (Sequence[str]): The K names.
        palette (Sequence[Sequence[int]]): K RGB colours in [0, 255].

    Returns:
        pathlib.Path: The file written.

    Raises:
        ValueError: If there are not as many truths and predictions as images, or
            no images.
    """
    counts = len(images), len(truths), len(predictions)
    if len(set(counts)) > 1 or counts[0] == 0:
        raise ValueError(
            'A detection sheet needs as many images as truths and '
            f'predictions, at least one; got {counts}.'
        )
    figure = Figure(
        figsize=(3 * PANEL_INCHES, (len(images) + 0.6) * PANEL_INCHES),
        layout='constrained',
    )
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)
    panels = figure.subplots(len(images), 3, squeeze=False)
    for panel, title in zip(panels[0], ('image', 'truth', 'prediction')):
        panel.set_title(title, fontsize=11, fontweight='bold')
    colours = [np.divide(colour, 255) for colour in palette]
    for row, image, truth, found in zip(panels, images, truths, predictions):
        for panel in row:
            panel.imshow(image)
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        draw_objects(row[1], truth, colours)
        draw_objects(row[2], found, colours)
    shown = {int(label) for found in (*truths, *predictions) for label in found.labels}
    figure.legend(
        handles=[
            Patch(facecolor=colours[label], edgecolor='0.6', label=classes[label])
            for label in sorted(shown)
        ],
        loc='outside lower center',
        ncols=3,
        fontsize=9,
        frameon=False,
    )
    return save_figure(figure, path)


def write_detector_sheet(
    path: str | os.PathLike,
    model,
    dataset,
    max_rows: int = 12,
    score: float = 0.5,
) -> Path:
    """Run a detector on evenly spaced samples, and draw its predictions.

    With a finished ``mmengine`` runner: ``write_detector_sheet(path,
    runner.model, runner.test_dataloader.dataset)``.

    Args:
        path (str | os.PathLike): The PNG file to write.
        model (mmdet.models.BaseDetector): A detector with masks. Its mode (training or
            evaluation) does not change.
        dataset (mmdet.datasets.BaseDetDataset): A data set with a test
            pipeline that loads boxes and masks.
        max_rows (int): The most samples to draw. Defaults to 12.
        score (float): Predictions below it are not drawn. Defaults to 0.5.

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
            found = sample.pred_instances
            # The best ones are drawn last, over others of the same object.
            found = found[found.scores.argsort()]
            truths.append(_objects(sample.gt_instances))
            predictions.append(_objects(found[found.scores >= score]))
    model.train(was_training)
    meta = dataset.metainfo
    return write_detection_sheet(
        path, images, truths, predictions, meta['classes'], meta['palette']
    )


def _objects(instances) -> Objects:
    instances = instances.cpu().numpy()
    boxes, masks = instances.bboxes, instances.masks
    return Objects(
        # mmdet's data sets have their own classes for boxes and masks.
        np.asarray(getattr(boxes, 'tensor', boxes)),
        np.asarray(getattr(masks, 'masks', masks), dtype=bool),
        instances.labels,
        instances.get('scores'),
    )


def draw_objects(panel: Axes, objects: Objects, colours: Sequence[np.ndarray]) -> None:
    """Draw boxes, masks and scores over an image.

    Args:
        panel: Where the image is.
        objects: What to draw.
        colours: One of each class, RGB in [0, 1].
    """
    for index, (box, mask, label) in enumerate(
        zip(objects.boxes, objects.masks, objects.labels)
    ):
        colour = colours[label]
        layer = np.zeros((*mask.shape, 4))
        layer[mask] = (*colour, MASK_OPACITY)
        panel.imshow(layer, interpolation='nearest')
        left, top, right, bottom = box
        # Pixel centres are at whole numbers in a panel.
        corner = (left - 0.5, top - 0.5)
        panel.add_patch(
            Rectangle(corner, right - left, bottom - top, ec=colour, fc='none', lw=1.2)
        )
        if objects.scores is not None:
            panel.text(
                *corner,
                f'{objects.scores[index]:.2f}',
                fontsize=6,
                color='white',
                verticalalignment='top',
                bbox=dict(facecolor=colour, edgecolor='none', pad=0.6),
                clip_on=True,
            )
