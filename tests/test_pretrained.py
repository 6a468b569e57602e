"""Whole models are written and come back bit for bit."""

import json

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import mmvssm
from mmvssm import zoo
from mmvssm.checkpoints import CheckpointError
from tiny import write_ade, write_config


def randomised(net):
    torch.manual_seed(3)
    with torch.no_grad():
        for key, value in net.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.randn_like(value) * 0.05)
            if key.endswith('running_var'):
                value.abs_()
    return net.eval()


def same_state(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    'name, options',
    [
        ('vim_t', dict(num_classes=7, cls_token='double', img_size=(32, 128))),
        ('mambar_t', dict(num_classes=3, head=dict(pooling='mean'), registers=4)),
        ('linear_attention_study_small', dict(num_classes=2, position=('rope',))),
    ],
)
def test_classifiers(tmp_path, name, options):
    net = randomised(mmvssm.build_classifier(name, **options))
    folder = mmvssm.save_pretrained(net, tmp_path / 'mine')
    assert sorted(p.name for p in folder.iterdir()) == [
        'README.md',
        'config.json',
        'model.safetensors',
    ]
    again = mmvssm.load_pretrained(folder)
    assert same_state(net, again) and not again.training
    x = torch.randn(1, 3, 64, 96)
    assert torch.equal(net(x), again(x))
    card = (folder / 'README.md').read_text()
    assert name in card and 'Licence of the weights: not stated' in card


def test_backbone(tmp_path):
    net = randomised(mmvssm.build_backbone('vmamba_t_v0', out_indices=(0, 2)))
    again = mmvssm.load_pretrained(mmvssm.save_pretrained(net, tmp_path / 'b'))
    assert same_state(net, again) and again.out_indices == (0, 2)


def segmentor(tmp_path):
    pytest.importorskip('mmseg')
    cfg = Config.fromfile(
        write_config(tmp_path / 'tiny.py', write_ade(tmp_path / 'ade'))
    )
    with DefaultScope.overwrite_default_scope('mmseg'):
        net = randomised(MODELS.build(cfg.model))
    net.dataset_meta = dict(classes=('a', 'b'), palette=[[0, 0, 0], [9, 9, 9]])
    return net, cfg


def test_segmentor(tmp_path):
    net, cfg = segmentor(tmp_path)
    with pytest.raises(ValueError, match='give the config of the segmentor'):
        mmvssm.save_pretrained(net, tmp_path / 'seg')
    folder = mmvssm.save_pretrained(net, tmp_path / 'seg', config=cfg, licence='CC0')
    again = mmvssm.load_pretrained(folder)
    assert same_state(net, again) and type(again) is type(net)
    assert list(again.dataset_meta['classes']) == ['a', 'b']
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(net(x), again(x))
    assert 'Licence of the weights: CC0' in (folder / 'README.md').read_text()
    # The folder is a checkpoint, too.
    other = randomised(MODELS.build(dict(cfg.model.backbone)))
    with torch.no_grad():
        other.outnorm0.weight.zero_()
    mmvssm.load_checkpoint(other, folder)
    assert same_state(other, net.backbone)


def test_licence_of_the_weights_it_began_with(tmp_path, monkeypatch):
    net = mmvssm.build_classifier('vim_t', 5)
    torch.save(net.state_dict(), tmp_path / 'vim.pth')
    monkeypatch.setattr(zoo, 'fetch', lambda source: tmp_path / 'vim.pth')
    net = mmvssm.build_classifier('vim_t', 5, pretrained=True)
    card = mmvssm.save_pretrained(net, tmp_path / 'mine') / 'README.md'
    assert zoo.find('vim_t').licence in card.read_text()
    assert zoo.find('vim_t').url in card.read_text()


def test_from_hugging_face(tmp_path, monkeypatch):
    net = randomised(mmvssm.build_classifier('vim_t', 5))
    folder = mmvssm.save_pretrained(net, tmp_path / 'mine')
    asked = []

    def fetch(source):
        asked.append(source)
        return folder / source.split('@')[0].rsplit('/', 1)[1]

    monkeypatch.setattr(zoo, 'fetch', fetch)
    assert same_state(net, mmvssm.load_pretrained('hf://me/mine@v1'))
    assert asked == ['hf://me/mine/config.json@v1', 'hf://me/mine/model.safetensors@v1']


def test_missing_and_damaged(tmp_path):
    with pytest.raises(CheckpointError, match='has no config.json; give a folder'):
        mmvssm.load_pretrained(tmp_path)
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(CheckpointError, match='config.json is damaged'):
        mmvssm.load_pretrained(tmp_path)


@pytest.mark.parametrize('found', ['os.system', 'torch.nn.Linear', 'mmvssm.a.B', 3])
def test_a_config_that_would_build_anything_is_refused(tmp_path, found):
    net, cfg = segmentor(tmp_path)
    folder = mmvssm.save_pretrained(net, tmp_path / 'seg', config=cfg)
    description = json.loads((folder / 'config.json').read_text())
    description['model']['decode_head']['loss_decode'] = [dict(type=found)]
    (folder / 'config.json').write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match='is refused.*no registered name'):
        mmvssm.load_pretrained(folder)


def test_weights_of_another_model(tmp_path):
    mmvssm.save_pretrained(mmvssm.build_classifier('vim_t', 5), tmp_path / 'a')
    mmvssm.save_pretrained(mmvssm.build_classifier('vim_t', 6), tmp_path / 'b')
    weights = tmp_path / 'a' / 'model.safetensors'
    weights.replace(tmp_path / 'b' / 'model.safetensors')
    with pytest.raises(CheckpointError, match='do not fit the model of config.json'):
        mmvssm.load_pretrained(tmp_path / 'b')
