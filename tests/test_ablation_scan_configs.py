"""The configs of VMamba's ablation: every row is built, counted and run."""

import math
import re

import pytest
import torch
from mmengine.registry import init_default_scope

pytest.importorskip('mmseg')
from mmseg.registry import MODELS

from ablation_data import write_data_config
from mmvssm.analysis.ablation import complexity_table, count_classifier, count_row
from mmvssm.engine.configs import ablation
from test_configs import batch
from tiny import REPO

FOLDER = REPO / 'configs' / 'ablation_scan'
README = (FOLDER / 'README.md').read_text()
ROWS = {row.name: row for row in ablation.load_rows(FOLDER)}
# What differs from the baseline: of the arch, or the scan order.
SWITCHES = dict(
    baseline=dict(),
    unidi=dict(forward_type='v051d_noz'),
    bidi=dict(forward_type='v052d_noz'),
    cascade=dict(forward_type='v052dc_noz'),
    cross_ndw=dict(ssm_conv=-1),
    unidi_ndw=dict(forward_type='v051d_noz', ssm_conv=-1),
    bidi_ndw=dict(forward_type='v052d_noz', ssm_conv=-1),
    cascade_ndw=dict(forward_type='v052dc_noz', ssm_conv=-1),
    init_v1=dict(ssm_init='v1'),
    init_v2=dict(ssm_init='v2'),
    d_state_1=dict(depths=(2, 2, 5, 2), ssm_ratio=2.0),
    d_state_2=dict(depths=(2, 2, 5, 2), ssm_d_state=2, ssm_ratio=2.0),
    d_state_4=dict(depths=(2, 2, 5, 2), ssm_d_state=4, ssm_ratio=2.0),
    d_state_8=dict(depths=(2, 2, 5, 2), ssm_d_state=8, ssm_ratio=1.5),
    d_state_16=dict(depths=(2, 2, 5, 2), ssm_d_state=16),
    ratio_1=dict(depths=(2, 2, 5, 2)),
    mlp_3=dict(mlp_ratio=3.0, ssm_ratio=1.5),
    mlp_2=dict(mlp_ratio=2.0, ssm_ratio=2.5),
    gelu=dict(ssm_act_layer='gelu'),
    relu=dict(ssm_act_layer='relu'),
    corners='corners',
    zigzag='zigzag',
    windows2='windows2',
    windows7='windows7',
    diagonals='diagonals',
    hilbert='hilbert',
    spiral='spiral',
)

# The cascade's two norms without weights, which the paper's figure leaves out.
EXTRA_FLOPS = dict(cascade=0.0127, cascade_ndw=0.0127)


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmseg')


@pytest.fixture(scope='module')
def counted():
    """Counting takes seconds, and rows with one arch count alike."""
    return {}


def test_the_table_is_complete():
    assert list(ROWS) == list(SWITCHES)
    ours = {name for name, switch in SWITCHES.items() if isinstance(switch, str)}
    assert {name for name, row in ROWS.items() if row.paper is None} == ours


@pytest.mark.parametrize('name', SWITCHES)
def test_settings(name):
    model = ablation.row_config(ROWS[name]).model
    backbone, switch = dict(model.backbone), SWITCHES[name]
    wanted = dict(
        type='mmvssm.VSSM',
        arch=dict(depths=(2, 2, 8, 2), dims=96),
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
    )
    if isinstance(switch, str):
        wanted['orders'] = switch
    else:
        wanted['arch'].update(switch)
    assert backbone == wanted
    assert model.decode_head.type == 'UPerHead' and model.decode_head.channels == 512
    assert model.decode_head.in_channels == [96, 192, 384, 768]
    assert model.auxiliary_head.in_channels == 384


@pytest.mark.parametrize('name', SWITCHES)
def test_loss_and_prediction(name):
    cfg = ablation.row_config(ROWS[name])
    cfg.model.backbone.arch.update(depths=(1, 1, 1, 1), dims=8)
    norm = dict(type='BN', requires_grad=True)
    channels = [8, 16, 32, 64]
    cfg.model.decode_head.update(in_channels=channels, channels=16, norm_cfg=norm)
    cfg.model.auxiliary_head.update(in_channels=32, channels=8, norm_cfg=norm)
    cfg.model.data_preprocessor.size = (64, 96)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    losses = model.loss(**model.data_preprocessor(batch(cfg), True))
    total = sum(v for k, v in losses.items() if 'loss' in k)
    assert total.isfinite()
    total.backward()
    # DDP's default flags need a gradient for every parameter.
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    with torch.no_grad():
        prediction = model.eval().test_step(batch(cfg, 1))[0]
    assert prediction.pred_sem_seg.data.shape == (1, 64, 96)
    assert prediction.seg_logits.data.isfinite().all()


@pytest.mark.parametrize('name', SWITCHES)
def test_parameters_and_flops_are_those_of_the_paper_and_of_the_readme(name, counted):
    row = ROWS[name]
    cfg = ablation.row_config(row)
    key = repr(
        {
            key: value
            for key, value in sorted(cfg.model.backbone.arch.items())
            if key not in ('ssm_init', 'ssm_act_layer')
        }
    ) + repr(cfg.model.backbone.get('orders'))
    if key not in counted:
        counted[key] = count_classifier(cfg)
    params, flops = counted[key].params / 1e6, counted[key].flops / 1e9
    line = re.search(rf'^\|.*\({name}\.py\).*$', README, re.M)
    cells = [cell.strip() for cell in line[0].split('|')]
    assert cells[3] == f'{params:.2f} M' and cells[5] == f'{flops:.2f} G'
    paper = row.paper
    assert cells[4] == (f'{paper.params} M' if paper else '-')
    assert cells[6] == (f'{paper.flops} G' if paper else '-')
    if paper:
        # Equal to the last digit that is printed there.
        assert f'{params:.1f}' == paper.params
        assert f'{flops - EXTRA_FLOPS.get(name, 0):.2f}' == paper.flops


def test_published_accuracies_and_speeds_are_in_the_readme():
    for name, row in ROWS.items():
        if row.paper:
            line = re.search(rf'^\| `{name}` .*$', README, re.M)[0]
            speeds = [
                row.paper.get(f'{mode}_images_per_second', '-')
                for mode in ('inference', 'training')
            ]
            cells = [cell.strip() for cell in line.split('|')[2:-1]]
            assert cells == [row.paper.top1, *speeds], name


def test_segmentor_is_counted():
    row = ROWS['cascade']
    counted = count_row(ablation.row_config(row))
    line = complexity_table([(row, counted)]).splitlines()[2]
    assert line in README
    assert counted[1].params > counted[0].params + 30e6


@pytest.mark.parametrize('name', ['cascade_ndw', 'd_state_16', 'hilbert'])
def test_quickstart_keeps_the_switches(name):
    data = str(REPO / 'configs' / '_base_' / 'ablation_quickstart.py')
    backbone = ablation.row_config(ROWS[name], data).model.backbone
    small = dict(depths=(1, 1, 2, 1), dims=32)
    switch = SWITCHES[name]
    if isinstance(switch, str):
        assert backbone.arch == small and backbone.orders == switch
    else:
        assert backbone.arch == {**switch, **small}


@pytest.mark.parametrize('name', ['cascade_ndw', 'windows7'])
def test_rows_are_trained(name, tmp_path):
    data = write_data_config(tmp_path)
    text, given = data.read_text(), "arch='no such thing'"
    assert given in text
    data.write_text(text.replace(given, 'arch=dict(depths=(1, 1, 1, 1), dims=8)'))
    cfg = ablation.row_config(ROWS[name], str(data))
    result = ablation.train_row(ROWS[name], cfg, 0, tmp_path / 'out')
    assert result['row'] == name and math.isfinite(result['value'])
    assert result['backbone']['arch']['dims'] == 8
    assert result['backbone']['arch'].get('ssm_conv') == (
        -1 if name == 'cascade_ndw' else None
    )
