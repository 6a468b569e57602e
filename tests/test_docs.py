"""What the pages say holds: their examples run, their links lead somewhere."""

import re

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from PIL import Image

import mmvssm
import mmvssm.engine
import tiny_det
from mmvssm.engine.labels.check import findings, inspect_data
from tiny import REPO
from tiny_det import needs_detection

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


@pytest.mark.parametrize(
    'page',
    [
        'README.md',
        'docs/models.md',
        'docs/flops.md',
        'docs/studies.md',
        'docs/theory.md',
    ],
)
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


def own_data(page, section, tmp_path, blocks):
    """The config that the first blocks of a section make together."""
    text = (REPO / page).read_text()
    part = re.split(r'^## ', text.partition(f'\n## {section}\n')[2], flags=re.M)[0]
    found = re.findall(r'```python\n(.*?)```', part, re.S)
    path = tmp_path / 'own.py'
    path.write_text(''.join(found[:blocks]))
    return mmvssm.engine.load_config(str(path))


def numbers_of_classes(cfg):
    """Classes that the data sets have, and those that the heads predict."""
    loaders = [cfg[f'{split}_dataloader'] for split in ('train', 'val', 'test')]
    named = {len(loader.dataset.metainfo.classes) for loader in loaders}
    heads = re.findall(r'\bnum_classes=(\d+)', Config(dict(x=cfg.model)).pretty_text)
    return named, set(map(int, heads))


@needs_detection
@pytest.mark.parametrize('blocks', [1, 2], ids=['masks', 'boxes'])
def test_own_boxes(tmp_path, blocks):
    cfg = own_data('docs/detection.md', 'Your own boxes', tmp_path, blocks)
    assert numbers_of_classes(cfg) == ({2}, {2})
    for split in ('train', 'val'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.ann_file == f'{split}.json'
        asked = [step for step in dataset.pipeline if step.type == 'LoadAnnotations']
        assert [step.get('with_mask', False) for step in asked] == [blocks == 1]
    root = cfg.train_dataloader.dataset.data_root
    assert cfg.test_dataloader == cfg.val_dataloader
    assert cfg.test_evaluator.ann_file == f'{root}/val.json'
    assert len(cfg.test_evaluator.metric) == 3 - blocks
    detector = tiny_det.build(cfg).train()
    data = detector.data_preprocessor(tiny_det.batch(), training=True)
    losses = detector(**data, mode='loss')
    assert ('loss_mask' in losses) == (blocks == 1)
    assert tiny_det.total_loss(losses).isfinite()


def test_own_masks(tmp_path):
    cfg = own_data('docs/segmentation.md', 'Your own masks', tmp_path, 1)
    assert numbers_of_classes(cfg) == ({2}, {2})
    write_masks(tmp_path / 'roads')
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.data_root == 'data/roads'
        dataset.data_root = str(tmp_path / 'roads')
    found = inspect_data(cfg)
    assert [report.split for report, *_ in found] == ['train', 'val+test']
    assert not list(findings(found))
    assert [list(report.classes.values()) for report, *_ in found] == [
        [{'of the pixels': 0.75, 'images': n}, {'of the pixels': 0.25, 'images': n}]
        for n in (2, 1)
    ]


def test_four_bands(tmp_path):
    """Stacked on the config of one's own masks."""
    tifffile = pytest.importorskip('tifffile')
    own_data('docs/segmentation.md', 'Your own masks', tmp_path, 1)
    (tmp_path / 'own.py').rename(tmp_path / 'roads.py')
    section = 'Images with more or fewer channels'
    cfg = own_data('docs/segmentation.md', section, tmp_path, 1)
    write_masks(tmp_path / 'roads')
    for path in (tmp_path / 'roads').glob('images/*/*.jpg'):
        bands = np.random.default_rng(0).integers(0, 4000, (64, 80, 4), np.uint16)
        tifffile.imwrite(path.with_suffix('.tif'), bands, photometric='minisblack')
        path.unlink()
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = str(tmp_path / 'roads')
    found = inspect_data(cfg)
    assert not list(findings(found))
    assert [dict(report.channels) for report, *_ in found] == [{4: 2}, {4: 1}]

    init_default_scope('mmseg')
    cfg.model.backbone.init_cfg = None
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    data = model.data_preprocessor(pseudo_collate([dataset[0]]))
    image = data['inputs'][..., :64, :64]
    assert image.dtype == torch.float32 and image.shape[1] == 4
    with torch.no_grad():
        assert model.decode_head(model.extract_feat(image)).isfinite().all()


def write_masks(root):
    """Images with one quarter of a second class, in the layout of the page."""
    mask = np.zeros((64, 80), np.uint8)
    mask[32:, 40:] = 1
    for split, number in (('train', 2), ('val', 1)):
        for kind in ('images', 'masks'):
            (root / kind / split).mkdir(parents=True)
        for i in range(number):
            Image.fromarray(100 * mask).convert('RGB').save(
                root / 'images' / split / f'{i}.jpg'
            )
            Image.fromarray(mask).save(root / 'masks' / split / f'{i}.png')


@pytest.mark.parametrize('block', [0, 1], ids=['VMamba', 'Vim'])
def test_own_config(tmp_path, block):
    """The heads take the maps that the backbone gives."""
    page = (REPO / 'docs' / 'segmentation.md').read_text()
    section = page.partition('## Your own config')[2]
    blocks = re.findall(r'```python\n(.*?)```', section, re.S)
    path = tmp_path / 'own.py'
    path.write_text(blocks[block])
    cfg = mmvssm.engine.load_config(str(path))
    cfg.model.backbone.init_cfg = None
    init_default_scope('mmseg')
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    maps = model.extract_feat(torch.randn(1, 3, 64, 96))
    assert [x.shape[-1] for x in maps] == [24, 12, 6, 3]
    for head in (model.decode_head, model.auxiliary_head):
        assert head(maps).isfinite().all()
