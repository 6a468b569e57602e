"""Pictures of a classifier: what they draw, and what they refuse."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from mmvssm.analysis.classification_sheet import (
    RIGHT,
    WRONG,
    write_classification_sheet,
    write_confusion,
)

CLASSES = ('striped disc', 'rippled hexagon', 'ring')


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved."""
    found, save = [], Figure.savefig

    def remember(figure, *args, **kwargs):
        found.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, 'savefig', remember)
    return found


def samples(count, height=40, width=60):
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (count, height, width, 3), np.uint8))
    truths = [i % 3 for i in range(count)]
    return images, truths, [0] * count, [0.98] * count


def texts_inside(figure):
    """All texts with a word; asserts that none is cut off or covers another one."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    boxes = {}
    for text in figure.findobj(lambda part: hasattr(part, 'get_text')):
        if text.get_visible() and any(c.isalpha() for c in text.get_text()):
            box = text.get_window_extent(renderer)
            assert figure.bbox.contains(*box.min) and figure.bbox.contains(*box.max)
            boxes[text] = box
    for text, box in boxes.items():
        for other, area in boxes.items():
            assert text is other or not box.overlaps(area) or text.get_rotation(), (
                f'{text.get_text()} covers {other.get_text()}'
            )
    return [text.get_text() for text in boxes]


def test_truth_above_and_prediction_below(tmp_path, figures):
    path = write_classification_sheet(
        tmp_path / 'deep' / 'sheet.png', *samples(8), CLASSES
    )
    assert Image.open(path).format == 'PNG'
    (figure,) = figures
    panels = [panel for panel in figure.axes if panel.get_visible()]
    assert len(panels) == 8
    assert [panel.get_title() for panel in panels[:3]] == list(CLASSES)
    labels = [panel.xaxis.label for panel in panels]
    assert [label.get_text() for label in labels[:2]] == [
        '✓ striped disc 98%',
        '✗ striped disc 98%',
    ]
    assert [label.get_color() for label in labels[:2]] == [RIGHT, WRONG]
    texts_inside(figure)


def test_bad_samples(tmp_path):
    images, truths, predictions, scores = samples(2)
    for bad in ((images[:1], truths, predictions, scores), ([], [], [], [])):
        with pytest.raises(ValueError, match='as many images as truths'):
            write_classification_sheet(tmp_path / 'sheet.png', *bad, CLASSES)
    with pytest.raises(ValueError, match=r'3 classes need .* shape \(2, 2\)'):
        write_confusion(tmp_path / 'confusion.png', np.eye(2), CLASSES)
    assert not list(tmp_path.iterdir())


def test_confusion_has_truth_in_rows(tmp_path, figures):
    counts = np.array([[8, 2, 0], [0, 5, 0], [0, 0, 0]])
    write_confusion(tmp_path / 'confusion.png', counts, CLASSES)
    (figure,) = figures
    panel = figure.axes[0]
    written = {text.get_position(): text.get_text() for text in panel.texts}
    assert written == {(0, 0): '8', (1, 0): '2', (1, 1): '5'}
    shares = panel.images[0].get_array()
    np.testing.assert_allclose(shares, [[0.8, 0.2, 0], [0, 1, 0], [0, 0, 0]])
    assert panel.get_ylabel() == 'true class' and '86.7% of 15' in panel.get_title()
    texts = texts_inside(figure)
    assert texts.count('rippled hexagon') == 2


def test_confusion_of_many_classes_has_no_names(tmp_path, figures):
    names = [f'class {i}' for i in range(50)]
    write_confusion(tmp_path / 'confusion.png', np.eye(50, dtype=int), names)
    assert not figures[0].axes[0].texts
    assert 'class 3' not in texts_inside(figures[0])
