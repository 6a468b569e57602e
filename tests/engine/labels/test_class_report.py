"""A classifier's report on each class."""

import json

import pytest
import torch

from mmvssm.engine import ClassReport

CLASSES = ('ant', 'bee', 'cat', 'dog')


@pytest.fixture
def said(monkeypatch):
    """What is logged."""
    texts = []
    where = 'mmvssm.engine.labels.class_report.print_log'
    monkeypatch.setattr(where, lambda text, *_, **__: texts.append(text))
    return texts


def sample(label, *scores, **more):
    labels = torch.tensor([label] if isinstance(label, int) else label)
    return dict(gt_label=labels, pred_score=torch.tensor(scores), **more)


def evaluate(samples, **options):
    report = ClassReport(**options)
    report.dataset_meta = dict(classes=CLASSES)
    report.process(None, samples)
    return report.evaluate(len(samples))


def test_counts(tmp_path):
    samples = [
        sample(0, 0.7, 0.1, 0.1, 0.1, img_path='a'),
        sample(0, 0.1, 0.6, 0.2, 0.1, img_path='b'),
        sample(0, 0.2, 0.5, 0.2, 0.1, img_path='c'),
        sample(0, 0.2, 0.1, 0.6, 0.1, img_path='d'),
        sample(1, 0.1, 0.8, 0.05, 0.05, img_path='e'),
    ]
    files = dict(
        out_file=str(tmp_path / 'new/classes.json'),
        predictions=str(tmp_path / 'predictions.json'),
    )
    metrics = evaluate(samples, **files)
    assert metrics == {'classes/mean_accuracy': 62.5, 'classes/absent': 2}
    report = json.loads((tmp_path / 'new/classes.json').read_text())
    assert (report['images'], report['top1']) == (5, 40)
    ant, bee, cat, dog = report['classes']
    assert ant == dict(
        number=0,
        name='ant',
        images=4,
        right=1,
        accuracy=25,
        precision=100,
        taken_for=[dict(name='bee', images=2), dict(name='cat', images=1)],
    )
    assert (bee['accuracy'], bee['precision']) == (100, pytest.approx(100 / 3))
    assert (cat['accuracy'], cat['precision']) == (None, 0)
    assert (dog['accuracy'], dog['precision']) == (None, None)
    found = json.loads((tmp_path / 'predictions.json').read_text())
    assert [row['image'] for row in found] == list('abcde')
    assert found[1]['label'] == 0
    assert found[1]['categories'][:2] == ['bee', 'cat']
    assert found[1]['category_numbers'][0] == 1
    assert found[1]['scores'][0] == pytest.approx(0.6)


def test_the_worst_are_logged(said):
    evaluate([sample(0, 0.1, 0.9, 0.0, 0.0), sample(1, 0.0, 1.0, 0.0, 0.0)], worst=1)
    (text,) = said
    assert 'ant    0.0 % of 1 images, taken for bee (1)' in text
    assert 'bee  100' not in text


@pytest.mark.parametrize(
    'odd',
    [
        sample([0, 1], 0.5, 0.5, 0.0, 0.0),
        dict(pred_score=torch.tensor([0.5, 0.5])),
        dict(gt_label=torch.tensor([0])),
    ],
    ids=['two classes', 'no class', 'no scores'],
)
def test_no_report_without_one_class_and_scores(odd, tmp_path, said):
    options = dict(out_file=str(tmp_path / 'classes.json'))
    options['predictions'] = str(tmp_path / 'predictions.json')
    assert evaluate([sample(0, 1.0, 0.0, 0.0, 0.0), odd], **options) == {}
    assert 'No report on classes' in said[0]
    assert not (tmp_path / 'classes.json').exists()
    assert len(json.loads((tmp_path / 'predictions.json').read_text())) == 2
