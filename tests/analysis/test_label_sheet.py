"""The sheet of labels: what it draws, and what it refuses."""

import numpy as np
import pytest
from PIL import Image

from mmvssm.analysis.detection_sheet import Objects
from mmvssm.analysis.label_sheet import (
    WRONG_COLOUR,
    write_mask_sheet,
    write_object_sheet,
)

CLASSES = ('ground', 'tree')
PALETTE = ([10, 200, 30], [220, 40, 50])


def share(path, colour, tolerance=0):
    picture = np.asarray(Image.open(path).convert('RGB')).astype(int)
    return (abs(picture - colour).max(-1) <= tolerance).mean()


def mask_sheet(path, labels, **options):
    image = np.full((40, 60, 3), 200, np.uint8)
    return write_mask_sheet(
        path, [image], [labels], ['a.jpg'], CLASSES, PALETTE, **options
    )


def test_labels_have_their_colours(tmp_path):
    labels = np.zeros((40, 60), np.uint8)
    labels[:, 30:] = 1
    path = mask_sheet(tmp_path / 'deep/sheet.png', labels)
    assert Image.open(path).format == 'PNG'
    for colour in PALETTE:
        assert share(path, colour) > 0.05
        # Over the picture.
        mixed = np.multiply(colour, 0.45) + 200 * 0.55
        assert share(path, mixed, 2) > 0.05
    assert share(path, WRONG_COLOUR) == 0


def test_ignored_pixels_are_darkened_and_wrong_ones_stand_out(tmp_path):
    labels = np.full((40, 60), 255, np.uint8)
    labels[:, :20] = 7
    path = mask_sheet(tmp_path / 'sheet.png', labels)
    assert share(path, (70, 70, 70), 1) > 0.08
    assert share(path, WRONG_COLOUR) > 0.03
    other = mask_sheet(tmp_path / 'none.png', labels, ignored=None)
    assert share(other, WRONG_COLOUR) > 2 * share(path, WRONG_COLOUR)


def test_boxes_and_masks(tmp_path):
    image = np.full((40, 60, 3), 200, np.uint8)
    mask = np.zeros((1, 40, 60), bool)
    mask[0, 5:35, 5:55] = True
    objects = Objects(np.float32([[5, 5, 55, 35]]), mask, np.array([1]))
    path = write_object_sheet(
        tmp_path / 's.png', [image], [objects], ['a.jpg: 1 object'], CLASSES, PALETTE
    )
    assert share(path, np.multiply(PALETTE[1], 0.45) + 200 * 0.55, 3) > 0.1


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match='at least one'):
        write_mask_sheet(tmp_path / 's.png', [], [], [], CLASSES, PALETTE)
