"""Write the objects that were detected in an image."""

import json
from pathlib import Path

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import encode_mask_results
from mmdet.visualization import DetLocalVisualizer
from torch import nn

VERB = 'searched'
# Objects of a lower score are in the JSON, but are not painted.
PAINTED_SCORE = 0.3


def save(
    model: nn.Module, picture: np.ndarray, prediction: DetDataSample, path: Path
) -> None:
    """Write ``path`` + ``_overlay.png`` and ``path`` + ``_objects.json``."""
    save_overlay(model, picture, prediction, Path(f'{path}_overlay.png'))
    save_objects(model, prediction, Path(f'{path}_objects.json'))


def save_overlay(
    model: nn.Module, picture: np.ndarray, prediction: DetDataSample, path: Path
) -> None:
    """Write the picture with boxes and masks painted over it."""
    painter = DetLocalVisualizer()
    painter.dataset_meta = model.dataset_meta
    painter.add_datasample(
        path.stem,
        picture,
        prediction.cpu(),
        draw_gt=False,
        pred_score_thr=PAINTED_SCORE,
        out_file=str(path),
    )


def save_objects(model: nn.Module, prediction: DetDataSample, path: Path) -> None:
    """Write the objects as JSON, best score first.

    Each has ``category`` (a name), ``category_number`` (counted from 0),
    ``score``, ``bbox`` (left, top, width and height in pixels, as in COCO) and,
    of an instance segmentation, ``segmentation`` (COCO's compressed run lengths).
    """
    found = prediction.pred_instances.cpu()
    masks = found.get('masks', [None] * len(found))
    objects = []
    for label, score, box, mask in zip(found.labels, found.scores, found.bboxes, masks):
        left, top, right, bottom = box.tolist()
        entry = dict(
            category=model.dataset_meta['classes'][label],
            category_number=int(label),
            score=float(score),
            bbox=[left, top, right - left, bottom - top],
        )
        if mask is not None:
            (encoded,) = encode_mask_results(torch.as_tensor(mask)[None].numpy())
            entry['segmentation'] = dict(encoded, counts=encoded['counts'].decode())
        objects.append(entry)
    objects.sort(key=lambda entry: -entry['score'])
    path.write_text(json.dumps(objects, indent=1) + '\n', encoding='utf-8')
