"""Rows about registers and about Vim: each is built, counted, trained and predicts."""

import re
from functools import cache

import pytest
import torch
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

from mmvssm.analysis.ablation import count_row
from mmvssm.engine.configs import ablation
from tiny import REPO

SMALL = str(REPO / 'configs/_base_/ablation_quickstart_cls.py')
# What differs from the baseline: of the backbone, and of the head.
SWITCHES = dict(
    ablation_registers=dict(
        baseline=({}, {}),
        no_registers=(dict(registers=0), dict(num_registers=0, pooling='patches')),
        class_token=(dict(registers=1, placement='middle'), dict(num_registers=1)),
        class_token_2304=(
            dict(registers=1, placement='middle'),
            dict(num_registers=1, widen=3),
        ),
        class_token_4608=(
            dict(registers=1, placement='middle'),
            dict(num_registers=1, widen=6),
        ),
        registers_3=(dict(registers=3), dict(num_registers=3)),
        registers_6=(dict(registers=6), dict(num_registers=6, reduce=2)),
        registers_24=(dict(registers=24), dict(num_registers=24, reduce=8)),
        start=(dict(placement='head'), {}),
        middle=(dict(placement='middle'), {}),
        one=({}, dict(pooling='one')),
        mean=({}, dict(pooling='mean')),
        patches=({}, dict(pooling='patches')),
    ),
    ablation_vim=dict(
        baseline=({}, {}),
        head=(dict(cls_token='head'), {}),
        double=(dict(cls_token='double'), {}),
        mean=(dict(cls_token='none'), {}),
        max=(dict(cls_token='none'), dict(pooling='max')),
        forward=(dict(cls_token='none', directions='forward'), {}),
        flipped=(
            dict(cls_token='none', directions='forward', flip_sequences=0.5),
            {},
        ),
        alternate=(dict(cls_token='none', directions='alternate'), {}),
        shared_conv=(dict(cls_token='none', directions='shared_conv'), {}),
    ),
)
ROWS = {
    folder: {row.name: row for row in ablation.load_rows(REPO / 'configs' / folder)}
    for folder in SWITCHES
}
NAMES = [(folder, name) for folder in SWITCHES for name in SWITCHES[folder]]
KEEPS_REDUCE = ('baseline', 'start', 'middle', 'one', 'mean', 'patches')


@cache
def config(folder, name):
    """As published. Tests only read it."""
    return ablation.row_config(ROWS[folder][name])


def readme(folder):
    return (REPO / 'configs' / folder / 'README.md').read_text()


def test_the_tables_are_complete():
    assert {folder: list(rows) for folder, rows in ROWS.items()} == {
        folder: list(rows) for folder, rows in SWITCHES.items()
    }


@pytest.mark.parametrize('folder,name', NAMES)
def test_settings(folder, name):
    model = config(folder, name).model
    backbone, head = SWITCHES[folder][name]
    common = dict(classification=True)
    if folder == 'ablation_vim':
        common.update(type='mmvssm.Vim', arch='t', cls_token='middle', drop_path_rate=0)
        wanted = dict(type='mmvssm.ClassTokenClsHead', in_channels=192, **head)
    else:
        common.update(type='mmvssm.MambaR', arch='b', img_size=128, drop_path_rate=0.1)
        wanted = dict(type='mmvssm.RegisterClsHead', in_channels=768, num_registers=12)
        wanted.update(reduce=4 if name in KEEPS_REDUCE else 1)
        wanted.update(head)
    assert model.backbone == {**common, **backbone}
    found = {key: value for key, value in model.head.items() if key != 'loss'}
    assert found == dict(wanted, num_classes=1000)


@pytest.mark.parametrize('folder,name', NAMES)
def test_loss_and_prediction_of_the_small_form(folder, name):
    cfg = ablation.row_config(ROWS[folder][name], SMALL)
    cfg.model.backbone.arch.update(embed_dims=16, depth=2)
    cfg.model.head.in_channels = 16
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    samples = [DataSample().set_gt_label(label) for label in (0, 6)]
    images = torch.randn(2, 3, 64, 64)
    loss = model(images, samples, mode='loss')['loss']
    assert loss.isfinite()
    loss.backward()
    # DDP's default flags need a gradient for every parameter.
    assert not [key for key, p in model.named_parameters() if p.grad is None]
    with torch.no_grad():
        scores = model.eval()(images, mode='predict')[0].pred_score
    assert scores.shape == (7,) and scores.isfinite().all()


@pytest.mark.parametrize('folder,name', NAMES)
def test_parameters_and_flops_are_those_of_the_readme(folder, name):
    row = ROWS[folder][name]
    counted, _ = count_row(config(folder, name))
    line = re.search(rf'^\|.*\({name}\.py\).*$', readme(folder), re.M)
    cells = [cell.strip() for cell in line[0].split('|')]
    params, flops = counted.params / 1e6, counted.flops / 1e9
    assert cells[1] == row.label
    assert cells[3] == f'{params:.2f} M' and cells[5] == f'{flops:.2f} G'
    if row.paper and 'params' in row.paper:
        assert (
            cells[4] == f'{row.paper.params} M' and f'{params:.0f}' == row.paper.params
        )


def test_published_accuracies_are_in_the_readme():
    for folder, rows in ROWS.items():
        for name, row in rows.items():
            line = re.search(rf'^\| `{name}` .*$', readme(folder), re.M)
            if row.paper:
                assert line[0].split('|')[2].strip() == row.paper.top1, name
            elif line:
                assert line[0].split('|')[2].strip() == '-', name


def test_a_single_register_spread_evenly_is_in_the_middle():
    """So there is no row for it beside that of the class token."""
    cfg = ablation.row_config(ROWS['ablation_registers']['class_token'], SMALL)
    places = []
    for placement in ('middle', 'even'):
        cfg.model.backbone.placement = placement
        places.append(MODELS.build(cfg.model.backbone).token_positions(64))
    assert places[0] == places[1] == (32,)
