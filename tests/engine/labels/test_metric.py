"""A mean over fewer classes than there are is called one."""

import pytest
import torch
from mmengine.config import Config

pytest.importorskip('mmseg')

from mmengine.registry import METRICS

from mmvssm.engine.labels import metric
from mmvssm.engine.labels.metric import count_nan_classes


@pytest.fixture
def said(monkeypatch):
    """What is logged."""
    texts = []
    monkeypatch.setattr(metric, 'print_log', lambda text, *_, **__: texts.append(text))
    return texts


def evaluate(label, prediction, classes=('ground', 'thing', 'sky')):
    built = METRICS.build(dict(type='mmvssm.IoUMetric', iou_metrics=['mIoU']))
    built.dataset_meta = dict(classes=classes)
    samples = [
        dict(
            pred_sem_seg=dict(data=torch.tensor([[prediction]])),
            gt_sem_seg=dict(data=torch.tensor([[label]])),
        )
    ]
    built.process({}, samples)
    return built.evaluate(1)


def test_nan_classes_are_counted_and_named(said):
    metrics = evaluate([0, 0, 255, 1], [0, 0, 0, 1])
    assert metrics['mIoU'] == 100 and metrics['nan_classes'] == 1
    assert len(said) == 1 and '1 of the 3 classes' in said[0] and 'sky' in said[0]


def test_a_class_that_was_only_predicted(said):
    metrics = evaluate([0, 0, 1], [0, 2, 1])
    assert metrics['mIoU'] == 50 and metrics['nan_classes'] == 1
    assert 'sky' in said[0]


def test_all_there_is_no_news(said):
    metrics = evaluate([0, 1, 2], [0, 1, 1])
    assert 'nan_classes' not in metrics
    assert metrics['mIoU'] == pytest.approx(50)
    assert not said


def test_nothing_but_ignored(said):
    assert evaluate([255, 255], [0, 1])['nan_classes'] == 3


def test_labels_of_no_class_are_counted(said):
    evaluate([0, 1, 2, 7, 7, 255], [0, 1, 2, 0, 0, 0])
    assert len(said) == 1 and '2 pixels have labels' in said[0]


@pytest.mark.parametrize('several', [False, True])
def test_it_takes_the_place_of_the_published(several):
    one = dict(type='IoUMetric', iou_metrics=['mIoU'])
    other = dict(type='CityscapesMetric')
    cfg = Config(dict(val_evaluator=[one, other] if several else one))
    count_nan_classes(cfg)
    found = cfg.val_evaluator[0] if several else cfg.val_evaluator
    assert found.type == 'mmvssm.IoUMetric' and found.iou_metrics == ['mIoU']
    assert not several or cfg.val_evaluator[1].type == 'CityscapesMetric'
