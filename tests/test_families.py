"""The family of CONTRIBUTING.md, by all ways in which a family is used."""

from dataclasses import replace

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

import mmvssm
from contributing import run_example
from mmvssm import families
from mmvssm.checkpoints import CheckpointError, convert, save_checkpoint
from mmvssm.registry import MODELS
from tiny import write_ade, write_config


@pytest.fixture
def toy(monkeypatch):
    """What the example defines; its family is forgotten afterwards."""
    # What is imported in the test only would be forgotten with it.
    MODELS.import_from_location()
    monkeypatch.setattr(families, '_FAMILIES', dict(families._FAMILIES))
    monkeypatch.setattr(MODELS, '_module_dict', dict(MODELS.module_dict))
    return run_example('Adding a family')


def randomised(net):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.1)
    return net


def test_listed_and_built(toy):
    assert 'toy_t' in mmvssm.list_models()
    logits = mmvssm.build_classifier('toy_t', 5)(torch.randn(1, 3, 32, 48))
    assert logits.shape == (1, 5)
    maps = mmvssm.build_backbone('toy_t', out_indices=(0,))(torch.randn(1, 3, 33, 47))
    assert [m.shape for m in maps] == [(1, 16, 8, 11)]


def test_watchers_see_every_family(toy, monkeypatch):
    monkeypatch.setattr(families, '_WATCHERS', [])
    names = []
    families.watch_families(lambda family: names.append(family.name))
    assert names == [family.name for family in families.families()]
    mmvssm.register_family(replace(toy['FAMILY'], name='later', title='Later'))
    assert names[-1] == 'later'

    def refuse(family):
        raise ValueError('no')

    monkeypatch.setattr(families, '_WATCHERS', [refuse])
    with pytest.raises(ValueError, match='no'):
        mmvssm.register_family(replace(toy['FAMILY'], name='last', title='Last'))
    assert 'last_t' not in mmvssm.list_models()


def test_published_names_are_converted(toy, tmp_path):
    net = randomised(mmvssm.build_classifier('toy_t', 5))
    published = {
        key.replace('backbone.', '')
        .replace('layers.', 'stages.')
        .replace('classifier.head.', 'fc.'): value
        for key, value in net.state_dict().items()
    }
    assert 'stages.0.blocks.0.norm.weight' in published and 'fc.bias' in published
    checkpoint = convert(published)
    assert checkpoint.family is toy['FAMILY'] and checkpoint.arch == 'toy_t'
    save_checkpoint(checkpoint, tmp_path / 'own.safetensors')
    other = mmvssm.build_classifier('toy_t', 5)
    report = mmvssm.load_checkpoint(other, tmp_path / 'own.safetensors')
    assert not report.missing and not report.unexpected
    for key, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


def test_init_cfg_converts_and_refuses(toy, tmp_path):
    net = randomised(mmvssm.build_backbone('toy_t'))
    torch.save(net.state_dict(), tmp_path / 'own.pth')
    cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'own.pth'))
    other = mmvssm.build_backbone('toy_t', init_cfg=cfg)
    other.init_weights()
    for key, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    vim = mmvssm.build_backbone('vim_t', init_cfg=cfg)
    with pytest.raises(CheckpointError, match='holds Toy weights'):
        vim.init_weights()


def test_layer_decay(toy):
    net = mmvssm.build_classifier('toy_t', 5)
    wrapper = build_optim_wrapper(
        net,
        dict(
            constructor='mmvssm.LayerDecayOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1.0),
            paramwise_cfg=dict(layer_decay_rate=0.5),
        ),
    )
    rate = {
        name: group['lr']
        for group in wrapper.optimizer.param_groups
        for name in group['param_names']
    }
    assert rate['backbone.patch_embed.weight'] == 0.5**3
    assert rate['backbone.layers.0.blocks.0.scan.A_logs'] == 0.5**2
    assert rate['backbone.layers.0.downsample.norm.weight'] == 0.5
    assert rate['backbone.layers.1.blocks.0.norm.weight'] == 0.5
    assert rate['classifier.head.weight'] == 1


def test_trained_from_a_config_of_mmseg(toy, tmp_path):
    pytest.importorskip('mmseg')
    from mmengine.runner import Runner

    cfg = Config.fromfile(
        write_config(tmp_path / 'tiny.py', write_ade(tmp_path / 'ade'))
    )
    cfg.work_dir = str(tmp_path / 'work')
    cfg.model.backbone = dict(type='mmvssm.Toy', arch='t')
    cfg.model.decode_head.update(
        in_channels=[16, 32], in_index=[0, 1], norm_cfg=dict(type='BN')
    )
    cfg.model.auxiliary_head = None
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=1, val_interval=1)
    runner = Runner.from_cfg(cfg)
    before = runner.model.backbone.patch_embed.weight.detach().clone()
    runner.train()
    saved = torch.load(tmp_path / 'work' / 'iter_1.pth', weights_only=False)
    after = saved['state_dict']['backbone.patch_embed.weight']
    assert after.isfinite().all() and not torch.equal(after, before)


@pytest.mark.parametrize('family', families.families(), ids=lambda f: f.name)
def test_target_layer(family):
    """Grad-CAM gets one tensor of every family, and its gradient."""
    net = mmvssm.build_classifier(f'{family.name}_{next(iter(family.archs))}').eval()
    outs = []
    layer = family.target_layer(net.backbone)
    layer.register_forward_hook(lambda module, args, out: outs.append(out))
    logits = net(torch.randn(1, 3, 64, 64))
    (out,) = outs
    grad = torch.autograd.grad(logits[0, 0], out)[0]
    assert out.ndim in (3, 4) and grad.isfinite().all()
    # The whole image has a say.
    assert (grad != 0).float().mean() > 0.99


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(title='Other'), "a family 'toy'"),
        (dict(name='other'), r'\(Toy\) already'),
        (dict(name='vim', title='Other'), "a family 'vim'"),
        (dict(name='vim_t', title='Other', archs=dict(stride8={})), 'vim_t_stride8'),
    ],
)
def test_names_are_given_once(toy, change, message):
    with pytest.raises(ValueError, match=message):
        mmvssm.register_family(replace(toy['FAMILY'], **change))


def test_each_model_is_of_one_family_alone():
    """Whatever the order in which families were registered."""
    for name, family, _ in families.models():
        with torch.device('meta'):
            keys = mmvssm.build_classifier(name).state_dict()
        found = [other for other in families.families() if other.prefixes(keys)]
        assert found == [family], name
