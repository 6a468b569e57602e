"""Write the classes that were predicted for an image."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from mmvssm.analysis.pictures import save_figure
from mmvssm.engine.labels.class_report import TOP

VERB = 'classified'
_INCHES = 3.2
_BAR = '#0072b2'


def save(model: nn.Module, picture: np.ndarray, prediction: Any, path: Path) -> str:
    """Write ``path`` + ``_overlay.png`` and ``path`` + ``_classes.json``.

    Args:
        model: With the names of the classes in ``dataset_meta``.
        picture: RGB, uint8 (H, W, 3).
        prediction: MMPretrain's data sample.
        path: Without the end of the names.

    Returns:
        The best class and its score, to print.
    """
    found = best_classes(model, prediction)
    text = json.dumps(found, indent=1) + '\n'
    Path(f'{path}_classes.json').write_text(text, encoding='utf-8')
    save_overlay(picture, found, Path(f'{path}_overlay.png'))
    return f'{found[0]["category"]} ({found[0]["score"]:.1%})'


def best_classes(model: nn.Module, prediction: Any) -> list[dict]:
    """The five best classes, the best one first.

    Each has ``category`` (a name), ``category_number`` (counted from 0) and ``score``,
    its probability.
    """
    scores = prediction.pred_score.cpu()
    best = scores.topk(min(TOP, len(scores)))
    return [
        dict(
            category=model.dataset_meta['classes'][number],
            category_number=number,
            score=score,
        )
        for number, score in zip(best.indices.tolist(), best.values.tolist())
    ]


def save_overlay(picture: np.ndarray, found: list[dict], path: Path) -> None:
    """Draw the picture, and its best classes as bars beside it."""
    height, width = picture.shape[:2]
    wide = _INCHES * min(max(width / height, 0.4), 2.5)
    figure = Figure(figsize=(wide + 3.6, _INCHES), layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=(wide, 3.6))
    left.imshow(picture)
    left.set_axis_off()
    places = range(len(found))
    right.barh(places, [entry['score'] for entry in found], color=_BAR, height=0.35)
    for place, entry in zip(places, found):
        right.text(
            *(0, place - 0.28, f'{entry["category"]}  {entry["score"]:.1%}'),
            fontsize=9,
            va='bottom',
        )
    right.set(xlim=(0, 1), ylim=(len(found) - 0.5, -0.9), yticks=[])
    right.set_xlabel('probability', fontsize=9)
    right.spines[['top', 'right', 'left']].set_visible(False)
    save_figure(figure, path)
