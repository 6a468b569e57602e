"""What a training starts from, settled before anything is built."""

import pytest
import torch
from mmengine.config import Config
from mmengine.model import PretrainedInit
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from mmvssm.backbones import VSSM
from mmvssm.checkpoints import CheckpointError
from mmvssm.engine import UsageError, choose_start
from mmvssm.engine.checkpoints.start import load_part

ARCH = dict(depths=(1, 1, 1, 1), dims=8)


def pretrained(source, **more):
    return dict(type='Pretrained', checkpoint=source, **more)


def config(backbone=None, head=None, kind='mmvssm.VSSM', model=None, **more):
    return Config(
        dict(
            model=dict(
                type='Net',
                backbone=dict(type=kind, **(backbone or {})),
                decode_head=dict(type='Head', **(head or {})),
                **(model or {}),
            ),
            **more,
        )
    )


IMAGENET = dict(init_cfg=pretrained('a.pth'))


@pytest.mark.parametrize(
    'cfg, wanted',
    [
        (config(), []),
        (config(IMAGENET), ['a.pth']),
        (config(dict(pretrained='a.pth')), ['a.pth']),
        (config(model=dict(pretrained='a.pth')), ['a.pth']),
        (config(IMAGENET, dict(init_cfg=[pretrained('h.pth')])), ['a.pth', 'h.pth']),
        (config(IMAGENET, load_from='all.pth'), ['all.pth']),
        (config(IMAGENET, model=dict(init_cfg=pretrained('all.pth'))), ['all.pth']),
        (config(IMAGENET, load_from='iter_5.pth', resume=True), ['a.pth']),
        (config(IMAGENET, kind='ResNet', load_from='b.pth'), ['a.pth', 'b.pth']),
    ],
)
def test_sources(cfg, wanted):
    resumes = cfg.get('resume')
    assert choose_start(cfg) == wanted
    # What fills the whole model does so by its init_cfg, but for foreign backbones.
    if cfg.model.backbone.type == 'mmvssm.VSSM' and not resumes:
        assert cfg.get('load_from') is None
        assert 'pretrained' not in cfg.model
        assert 'pretrained' not in cfg.model.backbone


def test_pretrained_of_a_classifier_is_of_the_whole_model():
    """MMPretrain's ``pretrained=`` fills the head, too; that of mmseg 0.x does not."""
    cfg = config(model=dict(pretrained='a.pth'), default_scope='mmpretrain')
    assert choose_start(cfg) == ['a.pth']
    assert cfg.model.init_cfg == pretrained('a.pth')
    assert 'init_cfg' not in cfg.model.backbone and 'pretrained' not in cfg.model
    cfg = config(model=dict(pretrained='a.pth'), default_scope='mmseg')
    assert choose_start(cfg) == ['a.pth']
    assert cfg.model.backbone.init_cfg == pretrained('a.pth')
    both = dict(pretrained='a.pth', init_cfg=pretrained('b.pth'))
    with pytest.raises(UsageError, match='both name its weights'):
        choose_start(config(model=both, default_scope='mmpretrain'))


def test_flags():
    cfg = config(IMAGENET)
    assert choose_start(cfg, 'b.pth', weights='ema') == ['b.pth']
    assert cfg.model.backbone.init_cfg == pretrained('b.pth', weights='ema')
    cfg = config(IMAGENET, dict(init_cfg=pretrained('h.pth')))
    assert choose_start(cfg, from_scratch=True) == []
    assert cfg.model.backbone.init_cfg is cfg.model.decode_head.init_cfg is None
    cfg = config(IMAGENET, load_from='c.pth')
    assert choose_start(cfg, resume='iter_5.pth') == []


def test_other_initialisers_stay():
    constant = dict(type='Constant', layer='Conv2d', val=3.0)
    own = dict(type=PretrainedInit, checkpoint='a.pth')
    cfg = config(dict(init_cfg=[constant, own]))
    assert choose_start(cfg) == ['a.pth']
    assert cfg.model.backbone.init_cfg == [constant, pretrained('a.pth')]
    assert choose_start(cfg, from_scratch=True) == []
    assert cfg.model.backbone.init_cfg == [constant]


@pytest.mark.parametrize(
    'cfg, options, said',
    [
        (config(), dict(weights='ema'), 'starts from random weights'),
        (config(IMAGENET, kind='ResNet'), dict(weights='ema'), 'by mmengine'),
        (config(), dict(pretrained='a', from_scratch=True), 'exclude each other'),
        (config(load_from='a'), dict(from_scratch=True), 'load_from=a exclude'),
        (config(load_from='a'), dict(pretrained='b'), 'leave one of the two out'),
        (config(dict(pretrained='b', **IMAGENET)), {}, 'pretrained=b is not all'),
    ],
)
def test_what_excludes_each_other(cfg, options, said):
    with pytest.raises(UsageError, match=said):
        choose_start(cfg, **options)


def test_backbones_take_pretrained(tmp_path):
    source = VSSM(ARCH)
    torch.save(source.state_dict(), tmp_path / 'a.pth')
    net = VSSM(ARCH, pretrained=str(tmp_path / 'a.pth'))
    net.init_weights()
    for key, value in source.state_dict().items():
        assert torch.equal(net.state_dict()[key], value)
    with pytest.raises(ValueError, match='leave one out'):
        VSSM(ARCH, pretrained='a.pth', init_cfg=pretrained('b.pth'))


@pytest.fixture
def whole(tmp_path):
    """A file of a model with a neck, and the neck."""
    neck = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1))
    state = {f'neck.{key}': value for key, value in neck.state_dict().items()}
    state |= {f'backbone.{k}': v for k, v in VSSM(ARCH).state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / 'whole.pth')
    return str(tmp_path / 'whole.pth'), neck


def test_a_neck_alone(whole):
    path, source = whole
    for prefix in ('neck', 'neck.'):
        neck = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1))
        assert 'loaded 4 of 4 tensors of Sequential' in load_part(neck, path, prefix)
        for key, value in source.state_dict().items():
            assert torch.equal(neck.state_dict()[key], value)


def test_a_neck_of_another_model(whole):
    path, _ = whole
    neck = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3))
    before = neck[0].weight.detach().clone()
    with pytest.raises(CheckpointError, match=r'3 of 4 tensors match.*1\.weight'):
        load_part(neck, path, 'neck.')
    with pytest.raises(CheckpointError, match='start with backbone, neck: set prefix'):
        load_part(neck, path)
    assert torch.equal(neck[0].weight, before)


def test_heads_of_another_width_stay_as_they_are(tmp_path):
    """As mmengine's load_from has it, but said in one line."""

    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.backbone = VSSM(ARCH)
            self.decode_head = nn.Sequential(nn.Conv2d(8, width, 1), nn.Conv2d(4, 2, 1))

    torch.save(Net(4).state_dict(), tmp_path / 'w.pth')
    net = Net(4)
    net.decode_head[1] = nn.Conv2d(6, 2, 1)
    kept = net.decode_head[1].weight.detach().clone()
    report = load_part(net, str(tmp_path / 'w.pth'))
    assert torch.equal(net.decode_head[1].weight, kept)
    assert 'decode_head.1.weight is 2x4x1x1 in the file and 2x6x1x1' in str(report)
    assert 'decode_head.0.weight' in report.matched


def test_addresses_that_mmengine_alone_knows(whole, monkeypatch):
    """Object stores, for one."""
    path, source = whole
    schemes = dict(CheckpointLoader._schemes)
    schemes = {'store://': lambda name, map_location: torch.load(path), **schemes}
    monkeypatch.setattr(CheckpointLoader, '_schemes', schemes)
    neck = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1))
    load_part(neck, 'store://bucket/whole.pth', 'neck.')
    assert torch.equal(neck[1].weight, source[1].weight)
    report = load_part(VSSM(ARCH), 'store://bucket/whole.pth')
    assert not report.missing and report.matched
