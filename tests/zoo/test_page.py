"""docs/zoo.md has the table. ``python tests/zoo/test_page.py`` writes it there."""

import re
from pathlib import Path

from mmengine.config import Config

from mmvssm.zoo import TABLE, find, of_config

REPO = Path(__file__).parents[2]
PAGE = REPO / 'docs/zoo.md'
BEGIN, END = '<!-- tables: begin -->', '<!-- tables: end -->'
CLASSIFIERS = '| Name | Figures | Measured | Weights in the file | Licence | Note |'
TRAINED = '| Name | Backbone | Figures | Licence | Note |'
WITHOUT = '| Name | Figures | Note |'
REPRODUCE = '| Command | Must give |'
SHOWN = ('mIoU', 'box AP', 'mask AP')


def table(head, rows):
    rule = '|' + '---|' * (head.count('|') - 1)
    return '\n'.join([head, rule, *rows])


def linked(row):
    return f'[`{row.name}`]({row.url})' if row.url else f'`{row.name}`'


def figures(row):
    return ', '.join(f'{name} {value}' for name, value in row.metrics.items())


def classifier(row):
    copy = f'`{row.copy}`' if row.copy else 'not known'
    cells = (linked(row), figures(row), row.evaluation, copy, row.licence, row.note)
    return f'| {" | ".join(cells)} |'


def trained(row):
    model = f'`{row.model}`'
    return (
        f'| {" | ".join((linked(row), model, figures(row), row.licence, row.note))} |'
    )


def commands(row):
    """How to get each figure of a segmentor or detector."""
    main = ', '.join(f'{k} {row.metrics[k]}' for k in SHOWN if k in row.metrics)
    config = f'configs/{row.name}.py'
    if row.url is None:
        cfg = Config.fromfile(REPO / config)
        processes = cfg.auto_scale_lr.base_batch_size // cfg.train_dataloader.batch_size
        yield f'| `tools/dist_train.sh {config} {processes}` | {main} |'
        return
    tool = 'python tools/test.py'
    yield f'| `{tool} {config}` | {main} |'
    if 'mIoU(ms+flip)' in row.metrics:
        multi_scale = row.metrics['mIoU(ms+flip)']
        yield f'| `{tool} {config} --tta` | mIoU {multi_scale} |'


def text():
    rows = list(TABLE.values())
    kinds = {
        kind: [row for row in rows if row.kind == kind and row.url]
        for kind in ('classifier', 'segmentor', 'detector')
    }
    without = [row for row in rows if not row.url]
    whole = [row for row in rows if row.kind != 'classifier']
    return '\n\n'.join(
        [
            table(CLASSIFIERS, map(classifier, kinds['classifier'])),
            '## Segmentors\n\nUPerNet on ADE20K, each for the config of its name.',
            table(TRAINED, map(trained, kinds['segmentor'])),
            '## Detectors\n\nMask R-CNN on COCO 2017, each for the config of its name.',
            table(TRAINED, map(trained, kinds['detector'])),
            '## Figures without a file',
            table(
                WITHOUT, (f'| `{x.name}` | {figures(x)} | {x.note} |' for x in without)
            ),
            '## Reproduce\n\n'
            'What each command must give. Nothing of it was run here: the figures are\n'
            "the authors'. The last rows have no published file and train first, as\n"
            'published; the others evaluate the published file. No tool here tests a\n'
            'classifier on ImageNet: their table says how it was done.',
            table(
                REPRODUCE,
                (line for row in _files_first(whole) for line in commands(row)),
            ),
        ]
    )


def _files_first(rows):
    return sorted(rows, key=lambda row: row.url is None)


def split():
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return before, *rest.partition(END)


def test_page_has_the_table():
    _, written, end, _ = split()
    assert end and written.strip() == text(), (
        'run `python tests/zoo/test_page.py` to write docs/zoo.md'
    )


def test_every_row_is_there():
    page = PAGE.read_text()
    for row in TABLE.values():
        assert f'`{row.name}`' in page
        assert row.url is None or row.url in page


def test_commands_name_configs_and_figures_of_the_table():
    """What is written is what the tools do: the config's own weights by name."""
    found = re.findall(
        r'`(python tools/test\.py|tools/dist\S+) configs/(\w+)\.py', text()
    )
    assert len(found) > 30
    for tool, name in found:
        assert (REPO / f'configs/{name}.py').is_file()
        assert of_config(name) is find(name)
        assert (find(name).url is None) == tool.startswith('tools/dist')


if __name__ == '__main__':
    before, _, end, after = split()
    PAGE.write_text(f'{before}{BEGIN}\n{text()}\n{END}{after}')
