"""The check of labels as a training runs it."""

import pytest

from mmvssm.engine.labels import check


@pytest.fixture(autouse=True)
def no_way_out(monkeypatch):
    monkeypatch.delenv('MMVSSM_DATA_CHECK', raising=False)


@pytest.fixture
def said(monkeypatch):
    """What is logged."""
    texts = []
    monkeypatch.setattr(check, 'print_log', lambda text, *_, **__: texts.append(text))
    return texts
