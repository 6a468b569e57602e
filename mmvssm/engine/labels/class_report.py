"""What a classifier's test found, class by class and image by image."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.fileio import dump
from mmengine.logging import print_log

from mmvssm.registry import METRICS

# As many as the best classes that are written for an image.
TOP = 5


@METRICS.register_module()
class ClassReport(BaseMetric):
    """Accuracy and precision of each class, and what it is taken for.

    The classes with the least accuracy are in the log. Its value is the mean of the
    accuracies of the classes that have images (``classes/mean_accuracy``). If some have
    none, their number is another one (``classes/absent``).

    Args:
        out_file: JSON file for the report: all classes in their order, each with its
            ``number``, ``name``, ``images``, ``right``, ``accuracy`` and ``precision``
            in percent (None where it has no image, or was never predicted), and
            ``taken_for``, up to three other classes with their numbers of images.
        predictions: JSON file for what is predicted: for each image its ``image``, true
            ``label`` (None without one), and the ``categories``, ``category_numbers``
            and ``scores`` of the five best classes.
        worst: How many classes the log names.
        **kwargs: ``collect_device`` and ``collect_dir`` of mmengine's ``BaseMetric``.
    """

    default_prefix = 'classes'

    def __init__(
        self,
        out_file: str | None = None,
        predictions: str | None = None,
        worst: int = 10,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.out_file = out_file
        self.predictions = predictions
        self.worst = worst

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Keep labels and the best scores of a batch."""
        for sample in data_samples:
            labels = sample['gt_label'].tolist() if 'gt_label' in sample else []
            # Models of other tasks of MMPretrain need not have scores.
            scores = sample.get('pred_score', torch.empty(0))
            best = scores.topk(min(TOP, len(scores)))
            self.results.append(
                dict(
                    image=sample.get('img_path', ''),
                    labels=labels,
                    numbers=best.indices.tolist(),
                    scores=best.values.tolist(),
                )
            )

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        """Write the files, log the worst classes."""
        number = 1 + max(
            max([*found['labels'], *found['numbers']], default=0) for found in results
        )
        names = list((self.dataset_meta or {}).get('classes') or [])
        names += [str(i) for i in range(len(names), number)]
        if self.predictions:
            _write(self.predictions, [_describe(found, names) for found in results])
        if any(len(x['labels']) != 1 or not x['numbers'] for x in results):
            print_log(
                'No report on classes: it needs a true class and scores of each image.',
                'current',
                level=30,
            )
            return {}
        rows = _rows(results, names)
        if self.out_file:
            right = sum(row['right'] for row in rows)
            top_1 = 100 * right / len(results)
            _write(self.out_file, dict(images=len(results), top1=top_1, classes=rows))
        present = [row for row in rows if row['images']]
        print_log(_worst(present, self.worst), 'current')
        metrics = {
            'mean_accuracy': sum(row['accuracy'] for row in present) / len(present)
        }
        if len(present) < len(rows):
            metrics['absent'] = len(rows) - len(present)
        return metrics


def _rows(results: list[dict], names: Sequence[str]) -> list[dict]:
    pairs = Counter((found['labels'][0], found['numbers'][0]) for found in results)
    images, predicted = Counter(), Counter()
    taken: dict[int, Counter] = {}
    for (truth, guess), count in pairs.items():
        images[truth] += count
        predicted[guess] += count
        if truth != guess:
            taken.setdefault(truth, Counter())[guess] = count
    return [
        dict(
            number=i,
            name=name,
            images=images[i],
            right=pairs[i, i],
            accuracy=_percent(pairs[i, i], images[i]),
            precision=_percent(pairs[i, i], predicted[i]),
            taken_for=[
                dict(name=names[other], images=count)
                for other, count in taken.get(i, Counter()).most_common(3)
            ],
        )
        for i, name in enumerate(names)
    ]


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def _worst(rows: list[dict], number: int) -> str:
    rows = sorted(rows, key=lambda row: row['accuracy'])[:number]
    width = max(len(row['name']) for row in rows)
    lines = ['The classes with the least accuracy:']
    for row in rows:
        others = ', '.join(f'{x["name"]} ({x["images"]})' for x in row['taken_for'])
        lines.append(
            f'  {row["name"]:{width}}  {row["accuracy"]:5.1f} % of {row["images"]} '
            f'images{f", taken for {others}" if others else ""}'
        )
    return '\n'.join(lines)


def _describe(found: dict, names: Sequence[str]) -> dict:
    (label,) = found['labels'] if len(found['labels']) == 1 else [None]
    return dict(
        image=found['image'],
        label=label,
        categories=[names[number] for number in found['numbers']],
        category_numbers=found['numbers'],
        scores=found['scores'],
    )


def _write(path: str, content: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    dump(content, path, indent=1)
