"""What the pages say holds: their examples run, their links lead somewhere."""

import re

import pytest
import torch

import mmvssm
from tiny import REPO

PAGES = sorted(
    [*REPO.glob('*.md'), *REPO.glob('docs/*.md'), *REPO.glob('configs/**/*.md')]
    + [REPO / 'benchmarks' / 'README.md']
)
name = {page: str(page.relative_to(REPO)) for page in PAGES}.get


def examples(page):
    """Python code that stands on its own feet."""
    blocks = re.findall(r'```python\n(.*?)```', (REPO / page).read_text(), re.S)
    return [block for block in blocks if re.match(r'import|from', block)]


def anchors(page):
    """Those of the headings, as GitHub makes them."""
    headings = re.findall(r'^#+ (.*)$', page.read_text(), re.M)
    kept = (re.sub(r'[^\w\- ]', '', heading.lower()) for heading in headings)
    return {text.replace(' ', '-') for text in kept}


@pytest.mark.parametrize('page', ['README.md', 'docs/models.md'])
def test_examples_run(page):
    blocks = examples(page)
    assert blocks
    for block in blocks:
        exec(compile(block, page, 'exec'), {})


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_links(page):
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.S)
    broken = []
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if re.match(r'https?:|mailto:', target):
            continue
        path, _, anchor = target.partition('#')
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize('page, digits', [('README.md', 1), ('docs/models.md', 2)])
def test_parameters_of_models(page, digits):
    rows = re.findall(r'`(\w+)` \| ([\d.]+) M \|', (REPO / page).read_text())
    assert len(rows) >= 11
    with torch.device('meta'):
        for model, millions in rows:
            net = mmvssm.build_classifier(model)
            count = sum(p.numel() for p in net.parameters())
            assert f'{count / 1e6:.{digits}f}' == millions, model


def test_every_model_is_listed():
    text = (REPO / 'docs' / 'models.md').read_text()
    assert all(f'`{model}`' in text for model in mmvssm.list_models('v*'))
    assert all(f'`{model}`' in text for model in mmvssm.list_models('m*'))


def test_accuracy_is_the_same_on_both_pages():
    rows = [
        dict(re.findall(r'`(\w+)` \| [\d.]+ M \|(?: [\d.]+ G \|)? ([\d.]+)', text))
        for text in (
            (REPO / page).read_text() for page in ('README.md', 'docs/models.md')
        )
    ]
    assert rows[0] and rows[0].items() <= rows[1].items()
