"""The table against models, configs and metafile."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config

import mmvssm
from mmvssm.errors import ZooError
from mmvssm.zoo import TABLE, Crop, find, of_config
from tiny import REPO

ROWS = list(TABLE.values())
each = pytest.mark.parametrize('row', ROWS, ids=lambda row: row.name)
CONFIGS = {path.stem for path in (REPO / 'configs').glob('*.py')}


@each
def test_row(row):
    assert row.model in mmvssm.list_models()
    assert row.metrics and all(0 < value < 100 for value in row.metrics.values())
    assert row.licence and row.evaluation
    if row.url is None:
        assert row.file == '' and row.copy is None
    else:
        assert re.fullmatch(r'https://[^\s]+', row.url)
        assert Path(row.file).name == row.file and row.file.endswith('.pth')
    if row.kind == 'classifier':
        (config,) = row.configs
        assert (REPO / f'configs/classification/{config}.py').is_file()
    else:
        assert row.name == row.configs[0]


def test_crops_of_test_images():
    """Those of the published evaluation scripts."""
    for row in ROWS:
        if row.kind != 'classifier' or row.url is None:
            assert row.crop is None
            continue
        assert (row.crop.size, row.crop.interpolation) == (224, 'bicubic')
        whole = row.model.startswith('mambar')
        assert row.crop.resized == (224 if whole else 256)
        assert row.evaluation.startswith(f'{row.crop}; ')
        assert ('no crop' in str(row.crop)) == whole
    assert Crop(384, 0.9, 'bilinear').resized == 426
    assert '426, bilinear, centre crop of 384' in str(Crop(384, 0.9, 'bilinear'))


def test_files_and_addresses_are_unique():
    rows = [row for row in ROWS if row.url]
    assert (
        len({row.file for row in rows}) == len({row.url for row in rows}) == len(rows)
    )
    configs = [config for row in ROWS for config in row.configs]
    assert len(set(configs)) == len(configs)


def test_find():
    assert find('mmvssm://vim_t') is find('vim_t') is TABLE['vim_t']
    assert of_config('upernet_vmamba_t_ema') is TABLE['upernet_vmamba_t']
    assert of_config('upernet_vmamba_quickstart') is None
    with pytest.raises(ZooError, match='did you mean upernet_vmamba_'):
        find('upernet_vmamba_tt')


def test_models_with_weights():
    have = mmvssm.list_models(pretrained=True)
    assert 'vim_t' in have and 'mambar_t' not in have
    assert set(have) == {
        row.name for row in ROWS if row.kind == 'classifier' and row.url
    }
    with pytest.raises(ZooError, match="ever published for 'mambar_t'"):
        mmvssm.build_classifier('mambar_t', pretrained=True)


@pytest.mark.parametrize(
    'name, copy',
    [
        ('vmamba_t_v0', 'model'),
        ('vim_b', 'model_ema'),
        ('vim_t', 'model'),
        ('mlla_b', None),
    ],
)
def test_copies(name, copy):
    assert find(name).copy == copy


def metafile(path):
    entries = yaml.safe_load((REPO / path).read_text())['Models']
    assert len({entry['Name'] for entry in entries}) == len(entries)
    return {entry['Name']: entry for entry in entries}


METAFILE = metafile('configs/metafile.yml')
CLASSIFIERS = metafile('configs/classification/metafile.yml')
_SHOWN = ('mIoU', 'mIoU(ms+flip)', 'box AP', 'mask AP')
TRAINED = [row for row in ROWS if row.kind != 'classifier' and row.url]


@pytest.mark.parametrize('row', TRAINED, ids=lambda row: row.name)
def test_metafile_and_readme_have_it(row):
    assert METAFILE[row.name]['Config'] == f'configs/{row.name}.py'
    readme = (REPO / 'configs/README.md').read_text()
    (line,) = re.findall(rf'^\| \[{row.name}\]\({row.name}\.py\) .*', readme, re.M)
    shown = [row.metrics[key] for key in _SHOWN if key in row.metrics]
    cells = [cell.strip() for cell in line.split('|')]
    assert [float(cell) for cell in cells[-1 - len(shown) : -1]] == shown


@pytest.mark.parametrize('name', METAFILE)
def test_metafile(name):
    entry, row = METAFILE[name], TABLE.get(name)
    assert entry.get('Weights') == (row and row.url)
    found = {}
    for result in entry.get('Results', ()):
        found |= result['Metrics']
    metrics = row.metrics if row else {}
    assert found == {key: metrics[key] for key in _SHOWN if key in metrics}


def test_every_model_is_a_classifier_of_the_metafile():
    names = {row.name for row in ROWS if row.kind == 'classifier'}
    models = {name for name in mmvssm.list_models() if 'study' not in name}
    assert CLASSIFIERS.keys() == names | models


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_metafile_of_classifiers(name):
    entry, row = CLASSIFIERS[name], TABLE.get(name)
    assert entry.get('Weights') == (row and row.url)
    shown = {'top-1': 'Top 1 Accuracy', 'top-5': 'Top 5 Accuracy'}
    metrics = row.metrics if row else {}
    results = [result['Metrics'] for result in entry.get('Results', ())]
    assert results == [{shown[k]: v for k, v in metrics.items()}] * bool(row)
    if row:
        assert entry['Config'] == f'configs/classification/{row.configs[0]}.py'
    cfg = Config.fromfile(REPO / entry['Config'])
    model = row.model if row else name
    assert f'{_family(cfg)}_{cfg.model.backbone.arch}' == model
    size = cfg.model.backbone.get('img_size', 224)
    with torch.device('meta'):
        net = mmvssm.build_classifier(model, img_size=size)
    assert entry['Metadata']['Parameters'] == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize('row', [row for row in ROWS if row.crop], ids=lambda r: r.name)
def test_config_tests_with_the_published_crop(row):
    cfg = Config.fromfile(REPO / f'configs/classification/{row.configs[0]}.py')
    load, resize, crop, pack = cfg.test_dataloader.dataset.pipeline
    assert load == dict(
        type='LoadImageFromFile',
        imdecode_backend='pillow',
        color_type='color_ignore_orientation',
    )
    assert resize == dict(
        type='ResizeEdge',
        scale=row.crop.resized,
        edge='short',
        backend='pillow',
        interpolation=row.crop.interpolation,
    )
    assert crop == dict(type='CenterCrop', crop_size=row.crop.size)
    assert cfg.test_dataloader.dataset.split == 'val'
    assert cfg.test_evaluator == dict(type='Accuracy', topk=(1, 5))


@pytest.mark.parametrize('row', TRAINED, ids=lambda row: row.name)
def test_configs_of_a_row(row):
    """Their model is that of the file, and starts from what was published for it."""
    for name in row.configs:
        cfg = Config.fromfile(REPO / f'configs/{name}.py')
        assert f'{_family(cfg)}_{cfg.model.backbone.arch}' == row.model


def _family(cfg):
    return dict(VSSM='vmamba', Vim='vim', MambaR='mambar', MLLA='mlla')[
        cfg.model.backbone.type.removeprefix('mmvssm.')
    ]


@pytest.mark.parametrize('name', sorted(CONFIGS))
def test_a_config_starts_from_its_published_weights(name):
    cfg = Config.fromfile(REPO / f'configs/{name}.py')
    init = cfg.model.backbone.get('init_cfg')
    if 'quickstart' in name:
        assert init is None
        return
    model = f'{_family(cfg)}_{cfg.model.backbone.arch}'
    assert TABLE[model].kind == 'classifier' and TABLE[model].url
    assert init == dict(type='Pretrained', checkpoint=f'mmvssm://{model}')


def test_ablations_start_from_scratch():
    paths = list((REPO / 'configs').glob('ablation*/*.py'))
    assert len(paths) > 30
    for path in paths:
        assert not Config.fromfile(path).model.backbone.get('init_cfg'), path
