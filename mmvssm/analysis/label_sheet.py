"""A picture of images with their labels drawn in, for a person to check."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mmvssm.analysis.contact_sheet import IGNORED, IGNORED_COLOUR
from mmvssm.analysis.detection_sheet import MASK_OPACITY, Objects, draw_objects
from mmvssm.analysis.pictures import save_figure

PANEL_INCHES = 2.8
_IN_A_ROW = 4
# Of labels that are no class.
WRONG_COLOUR = (255, 0, 255)
# Ignored pixels keep their picture, darkened.
_DARKENED = 0.35


def write_mask_sheet(
    path: str | os.PathLike,
    images: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    titles: Sequence[str],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    ignored: int | None = IGNORED,
) -> Path:
    """Draw each image, the labels over it, and the labels alone.

    Args:
        path (str | os.PathLike): The PNG file to write.
        images (Sequence[numpy.ndarray]): RGB images, uint8 (H, W, 3).
        labels (Sequence[numpy.ndarray]): Labels, integers (H, W) in [0, 255].
        titles (Sequence[str]): What to write over each row.
        classes (Sequence[str]): The K names.
        palette (Sequence[Sequence[int]]): K RGB colours in [0, 255].
        ignored (int | None): The label that no loss counts. Defaults to 255.

    Returns:
        pathlib.Path: The file written.

    Raises:
        ValueError: If there are no images, or not as many labels and titles.
    """
    figure, panels = _start(images, labels, titles)
    table = np.full((256, 3), WRONG_COLOUR, np.uint8)
    table[: len(palette)] = np.asarray(palette, np.uint8).reshape(-1, 3)[:256]
    if ignored is not None:
        table[ignored] = IGNORED_COLOUR
    seen: set[int] = set()
    for row, image, labelled in zip(panels, images, labels):
        labelled = labelled.astype(np.uint8)
        seen |= set(np.unique(labelled).tolist())
        colours = table[labelled]
        mixed = image * (1 - MASK_OPACITY) + colours * MASK_OPACITY
        if ignored is not None:
            mixed[labelled == ignored] = image[labelled == ignored] * _DARKENED
        row[0].imshow(image)
        row[1].imshow(mixed.round().astype(np.uint8))
        row[2].imshow(colours, interpolation='nearest')
    names = {}
    for label in sorted(seen):
        if label == ignored:
            names['ignored (darkened)'] = IGNORED_COLOUR
        elif label < len(classes):
            names[f'{label} {classes[label]}'] = table[label]
        else:
            names['no class'] = WRONG_COLOUR
    return _finish(figure, panels, titles, names, path, ('labels drawn in', 'labels'))


def write_object_sheet(
    path: str | os.PathLike,
    images: Sequence[np.ndarray],
    objects: Sequence[Objects],
    titles: Sequence[str],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
) -> Path:
    """Draw each image, and its boxes and masks over it.

    Args:
        path (str | os.PathLike): The PNG file to write.
        images (Sequence[numpy.ndarray]): RGB images, uint8 (H, W, 3).
        objects (Sequence[Objects]): What the annotations say is in them.
        titles (Sequence[str]): What to write over each row.
        classes (Sequence[str]): The K names.
        palette (Sequence[Sequence[int]]): K RGB colours in [0, 255].

    Returns:
        pathlib.Path: The file written.

    Raises:
        ValueError: If there are no images, or not as many objects and titles.
    """
    figure, panels = _start(images, objects, titles, columns=2)
    colours = [np.divide(colour, 255) for colour in palette]
    for row, image, found in zip(panels, images, objects):
        for panel in row:
            panel.imshow(image)
        draw_objects(row[1], found, colours)
    shown = sorted({int(label) for found in objects for label in found.labels})
    names = {f'{label} {classes[label]}': palette[label] for label in shown}
    return _finish(figure, panels, titles, names, path, ('boxes drawn in',))


def write_class_sheet(
    path: str | os.PathLike, images: Sequence[np.ndarray], titles: Sequence[str]
) -> Path:
    """Draw images of a class each, four in a row.

    Args:
        path (str | os.PathLike): The PNG file to write.
        images (Sequence[numpy.ndarray]): RGB images, uint8 (H, W, 3).
        titles (Sequence[str]): What to write over each: its class and file.

    Returns:
        pathlib.Path: The file written.
    """
    rows = -(-len(images) // _IN_A_ROW)
    size = (_IN_A_ROW * PANEL_INCHES, rows * (PANEL_INCHES + 0.4))
    figure = Figure(figsize=size, layout='constrained')
    panels = figure.subplots(rows, _IN_A_ROW, squeeze=False).flat
    for panel, image, title in zip(panels, images, titles):
        panel.imshow(image)
        panel.set_title(title, fontsize=8)
    for panel in figure.axes:
        panel.set_axis_off()
    return save_figure(figure, path)


def _start(
    images: Sequence, labels: Sequence, titles: Sequence, columns: int = 3
) -> tuple[Figure, np.ndarray]:
    if not len(images) or {len(labels), len(titles)} != {len(images)}:
        raise ValueError(
            'A sheet needs as many labels and titles as images, at least one; got '
            f'{len(images)}, {len(labels)} and {len(titles)}.'
        )
    ratio = float(np.median([image.shape[0] / image.shape[1] for image in images]))
    height = PANEL_INCHES * min(ratio, 2.0) + 0.35
    figure = Figure(
        figsize=(columns * PANEL_INCHES, len(images) * height + 1.0),
        layout='constrained',
    )
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)
    return figure, figure.subplots(len(images), columns, squeeze=False)


def _finish(
    figure: Figure,
    panels: np.ndarray,
    titles: Sequence[str],
    names: dict[str, Sequence[int]],
    path: str | os.PathLike,
    columns: Sequence[str],
) -> Path:
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    for row, title in zip(panels, titles):
        row[0].set_title(title, fontsize=7, loc='left')
    for panel, name in zip(panels[-1], ('image', *columns)):
        panel.set_xlabel(name, fontsize=9, fontweight='bold')
    if names:
        figure.legend(
            handles=[
                Patch(facecolor=np.divide(colour, 255), edgecolor='0.6', label=name)
                for name, colour in names.items()
            ],
            loc='outside lower center',
            ncols=3,
            fontsize=8,
            frameon=False,
        )
    return save_figure(figure, path)
