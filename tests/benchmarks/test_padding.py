"""How an image alone is compared with the same image in a padded batch."""

import math

import pytest
import torch

from tiny_det import needs_detection


def objects(boxes, labels, scores):
    from mmengine.structures import InstanceData

    return InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels),
        scores=torch.tensor(scores),
    )


@needs_detection
def test_objects_found_again(load):
    compare = load('padding').compare_boxes
    alone = objects(
        [[0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]], [0, 1, 2], [0.9, 0.8, 0.7]
    )
    # Moved by a pixel to the right; of another class; somewhere else.
    padded = objects(
        [[1, 0, 11, 10], [20, 20, 30, 30], [46, 40, 56, 50]], [0, 0, 2], [0.7, 0.8, 0.2]
    )
    found = compare(alone, padded)
    assert found['again'] == [1, 0, 0]
    assert found['box'] == [pytest.approx(0.5)]
    assert found['score'] == [pytest.approx(0.2)]
    # One object is not found twice.
    twice = objects([[0, 0, 10, 10]] * 2, [0, 0], [0.9, 0.8])
    assert compare(twice, padded)['again'] == [1, 0]
    # Only the best ones count.
    many = objects([[0, 0, 10, 10]] * 7, [0] * 7, [0.1] * 6 + [0.2])
    assert compare(many, many)['again'] == [1] * 5
    nothing = objects([], [], [])
    assert compare(alone, nothing)['again'] == [0, 0, 0]
    assert compare(nothing, alone)['again'] == []
    broken = objects([[math.nan] * 4], [0], [0.9])
    assert compare(alone, broken)['again'] == [0, 0, 0]


@needs_detection
def test_alone_and_padded(load):
    """Sizes of the batch, and the positions that are compared."""
    from test_padding_detection import config, detector, mixed

    predict = load('padding').predict
    model = detector(config()).eval()
    shapes = []
    model.backbone.register_forward_pre_hook(
        lambda module, args: shapes.append(tuple(args[0].shape))
    )
    data = {key: value[0] for key, value in mixed([(64, 90)]).items()}
    alone, padded = (predict(model, data, padded)[1] for padded in (False, True))
    assert shapes == [(1, 3, 64, 96), (2, 3, 96, 160)]
    assert [x.shape[1:] for x in alone] == [(16, 23), (8, 12), (4, 6), (2, 3)]
    for a, b in zip(alone, padded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
