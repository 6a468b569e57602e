"""The configs of the ablation: every row is built, counted and run."""

import re

import pytest
import torch
from mmengine.registry import init_default_scope

pytest.importorskip('mmseg')
from mmseg.registry import MODELS

from mmvssm.analysis.ablation import complexity_table, count_classifier, count_row
from mmvssm.engine.configs import ablation
from test_configs import batch
from tiny import REPO

FOLDER = REPO / 'configs' / 'ablation'
ROWS = {row.name: row for row in ablation.load_rows(FOLDER)}
# What differs from the baseline.
SWITCHES = dict(
    baseline=dict(),
    input_gate=dict(input_gate=True),
    forget_gate=dict(forget_gate=True),
    shortcut=dict(shortcut=True),
    no_normalisation=dict(normalise=False),
    single_head=dict(single_head=True),
    block_all=dict(design='all'),
    block_sub=dict(design='sub'),
    ape=dict(position=('ape',)),
    lepe=dict(position=('lepe',)),
    cpe=dict(position=('cpe',)),
    rope=dict(position=('rope',)),
    mlla_block=dict(design='sub', position=('cpe', 'lepe', 'rope')),
    mlla_t=None,
    mamba=dict(
        design='all',
        input_gate=True,
        forget_gate=True,
        shortcut=True,
        normalise=False,
        single_head=True,
        feature_map=False,
    ),
)
TINY = {
    'mmvssm.LinearAttentionStudy': dict(depths=(1, 1, 1, 1), dims=8, head_dim=4),
    'mmvssm.MLLA': dict(depths=(1, 1, 1, 1), dims=8, num_heads=(1, 2, 4, 8)),
}
# The paper's forget gate costs one scan; a normaliser of its own costs another.
EXTRA_FLOPS = dict(forget_gate=0.42)


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmseg')


def test_the_table_is_complete():
    assert list(ROWS) == list(SWITCHES)


@pytest.mark.parametrize('name', SWITCHES)
def test_settings(name):
    model = ablation.row_config(ROWS[name]).model
    backbone = dict(model.backbone)
    assert model.decode_head.type == 'UPerHead' and model.decode_head.channels == 512
    arch, kind = backbone.pop('arch'), backbone.pop('type')
    common = dict(out_indices=(0, 1, 2, 3), drop_path_rate=0.2)
    if SWITCHES[name] is None:
        # As all rows it starts from scratch.
        assert backbone.pop('init_cfg') is None
        assert (kind, arch, backbone) == ('mmvssm.MLLA', 't', common)
        assert model.decode_head.in_channels == [64, 128, 256, 512]
        return
    assert kind == 'mmvssm.LinearAttentionStudy'
    assert backbone == dict(common, img_size=512, **SWITCHES[name])
    # Mamba's block has no MLP: more of them keep the FLOPs alike.
    more = backbone.get('design') == 'all'
    assert arch == (dict(depths=(2, 2, 9, 2), dims=96) if more else 't')
    assert model.decode_head.in_channels == [96, 192, 384, 768]
    assert model.auxiliary_head.in_channels == 384


@pytest.mark.parametrize('name', SWITCHES)
def test_loss_and_prediction(name):
    cfg = ablation.row_config(ROWS[name])
    tiny = TINY[cfg.model.backbone.type]
    cfg.model.backbone.arch = tiny
    channels = [tiny['dims'] * 2**i for i in range(4)]
    norm = dict(type='BN', requires_grad=True)
    cfg.model.decode_head.update(in_channels=channels, channels=16, norm_cfg=norm)
    cfg.model.auxiliary_head.update(in_channels=channels[2], channels=8, norm_cfg=norm)
    cfg.model.data_preprocessor.size = (64, 96)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    losses = model.loss(**model.data_preprocessor(batch(cfg), True))
    sum(v for k, v in losses.items() if 'loss' in k).backward()
    # DDP's default flags need a gradient for every parameter.
    assert not [k for k, p in model.named_parameters() if p.grad is None]
    with torch.no_grad():
        prediction = model.eval().test_step(batch(cfg, 1))[0]
    assert prediction.pred_sem_seg.data.shape == (1, 64, 96)


@pytest.mark.parametrize('name', SWITCHES)
def test_parameters_and_flops_are_those_of_the_paper_and_of_the_readme(name):
    row = ROWS[name]
    counted = count_classifier(ablation.row_config(row))
    params, flops = counted.params / 1e6, counted.flops / 1e9
    line = re.search(
        rf'^\|.*\({name}\.py\).*$', (FOLDER / 'README.md').read_text(), re.M
    )
    cells = [cell.strip() for cell in line[0].split('|')]
    assert cells[3] == f'{params:.2f} M' and cells[5] == f'{flops:.2f} G'
    if row.paper:
        # Rounded there; a half and a little more, for what is not said.
        assert params == pytest.approx(float(row.paper.params), abs=0.65)
        flops -= EXTRA_FLOPS.get(name, 0)
        assert flops == pytest.approx(float(row.paper.flops), abs=0.09)


def test_segmentor_is_counted():
    row = ROWS['baseline']
    counted = count_row(ablation.row_config(row))
    line = complexity_table([(row, counted)]).splitlines()[2]
    assert line in (FOLDER / 'README.md').read_text()
    assert counted[1].params > counted[0].params + 30e6
