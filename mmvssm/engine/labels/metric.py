"""mmseg's IoU metric, which says of what its means are.

This file can be imported without mmseg; only building the metric needs it.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log

from mmvssm.registry import METRICS

from .report import shorten

# Beside mIoU, where it is not 0: classes that are in no label.
NAN_CLASSES = 'nan_classes'


def count_nan_classes(cfg: Config) -> None:
    """Put ``mmvssm.IoUMetric`` in the place of mmseg's, in all evaluators.

    Args:
        cfg: Changed in place.
    """
    for key in ('val_evaluator', 'test_evaluator'):
        metrics = cfg.get(key) or []
        for metric in metrics if isinstance(metrics, (list, tuple)) else [metrics]:
            if isinstance(metric, dict) and (
                metric.get('type') == 'mmseg.IoUMetric'
                or (metric.get('type') == 'IoUMetric' and _scope(cfg) == 'mmseg')
            ):
                metric['type'] = 'mmvssm.IoUMetric'


def _scope(cfg: Config) -> str:
    return cfg.get('default_scope') or 'mmseg'


@METRICS.register_module(name='IoUMetric')
def iou_metric(**options: Any) -> Any:
    """Build mmseg's ``IoUMetric`` that says which classes its means leave out.

    A class that is in no label has no accuracy (nan), and no IoU unless it was
    predicted. mIoU is the mean of the others: 100 where a model knows one class and the
    labels have no other. Such classes are named in the log, and their number is a
    value of its own beside mIoU (``nan_classes``). Labels that are neither a class
    nor ignored count nowhere; a warning says how many.

    Args:
        **options: Of mmseg's class.
    """
    return _metric()(**options)


@cache
def _metric() -> type:
    from mmseg.evaluation import IoUMetric as Published

    class IoUMetric(Published):
        def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
            before = len(self.results)
            super().process(data_batch, data_samples)
            number = len(self.dataset_meta['classes'])
            for place, sample in zip(range(before, len(self.results)), data_samples):
                label = sample['gt_sem_seg']['data']
                outside = (label < 0) | (label >= number)
                outside &= label != self.ignore_index
                count = torch.tensor(int(outside.sum()))
                self.results[place] = (*self.results[place], count)

        def compute_metrics(self, results: list) -> dict[str, float]:
            metrics = super().compute_metrics([areas[:4] for areas in results])
            if self.format_only or not results:
                return metrics
            labelled = sum(areas[3] for areas in results)
            outside = int(sum(areas[4] for areas in results))
            classes = self.dataset_meta['classes']
            absent = [name for name, area in zip(classes, labelled) if not area > 0]
            if outside:
                _warn(
                    f'{outside} pixels have labels that are neither one of the '
                    f'{len(classes)} classes nor ignored ({self.ignore_index}), and '
                    'count nowhere: `python tools/check_data.py CONFIG` says where.'
                )
            if absent:
                metrics[NAN_CLASSES] = len(absent)
                _warn(
                    f'{len(absent)} of the {len(classes)} classes are in no label, so '
                    f'nan ({shorten(absent)}): mIoU is the mean of the others, and of '
                    '0 for those that were predicted.'
                )
            return metrics

    return IoUMetric


def _warn(text: str) -> None:
    print_log(text, 'current', level=30)
