"""Checkpoints of MLLA: names, rotary tables, refusals."""

import pytest
import torch

import mmvssm
from mmvssm.backbones import MLLA, mlla
from mmvssm.checkpoints import convert, load_checkpoint
from mmvssm.heads import ClassificationHead, ImageClassifier

from .files import randomised, refuse, same

ARCH = dict(depths=(1, 2, 1, 1), dims=8, num_heads=(2, 2, 4, 4))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def classifier(arch=ARCH, num_classes=5):
    backbone = MLLA(arch, out_indices=(3,), out_norm=False)
    return ImageClassifier(backbone, ClassificationHead(64, num_classes))


def published(model):
    """Published names, with the tables of a file trained at 64x64."""
    state = {
        key.removeprefix('backbone.').removeprefix('classifier.'): value
        for key, value in randomised(model).items()
    }
    for key in list(state):
        block, found, _ = key.partition('.attn.qk.weight')
        if found:
            state[f'{block}.attn.rope.rotations'] = torch.zeros(16, 16, 4, 2)
    return state


class Segmentor(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = MLLA(ARCH)
        self.decode_head = torch.nn.Conv2d(64, 4, 1)


def test_classifier_file():
    net = classifier()
    state = published(net)
    assert {'norm.weight', 'head.weight'} <= set(state)
    report = load_checkpoint(net, dict(model=state))
    assert (report.family, report.format, report.contents) == (
        'MLLA',
        'mlla',
        'classifier',
    )
    assert not report.missing and not report.unexpected
    assert report.notes == ['5 rotary tables were left out: the model makes its own']
    for key, value in net.state_dict().items():
        short = key.removeprefix('backbone.').removeprefix('classifier.')
        assert torch.equal(value, state[short]), key


def test_classifier_file_into_a_dense_backbone():
    net = MLLA(ARCH)
    report = load_checkpoint(net, published(classifier()))
    assert report.missing == [
        f'norm{i}.{leaf}' for i in range(4) for leaf in ('weight', 'bias')
    ]
    assert {key.split('.')[0] for key in report.unexpected} == {'classifier'}
    assert 'new by design, as initialised: norm0.* (2)' in str(report)


@pytest.mark.parametrize('prefix', ['', 'module.', 'module.backbone.'])
def test_prefixes(prefix):
    net = MLLA(ARCH)
    state = randomised(net)
    report = load_checkpoint(net, {prefix + k: v for k, v in state.items()})
    assert same(net, state) and not report.missing and not report.unexpected


def test_segmentor():
    net = Segmentor()
    state = randomised(net)
    report = load_checkpoint(net, dict(state_dict=state))
    assert report.contents == 'segmentor'
    assert not report.missing and not report.unexpected and same(net, state)


def test_conversion_is_idempotent():
    first = convert(published(classifier()))
    second = convert(first.state_dict())
    assert first.renamed == 4 and not second.renamed
    assert list(second.state_dict()) == list(first.state_dict())


@pytest.mark.parametrize('name', mmvssm.list_models('mlla_*'))
def test_published_arch_is_named(name):
    with torch.device('meta'):
        assert mlla.FAMILY.describe(mmvssm.build_backbone(name).state_dict()) == name


@pytest.mark.parametrize(
    'change,message',
    [
        (dict(dims=16), 'dims=16.*dims=8'),
        (dict(depths=(1, 1, 1, 1)), r'layers\.1\.blocks\.1\.\S+ is not in the file'),
        (dict(depths=(1, 3, 1, 1)), r'layers\.1\.blocks\.2\.\S+ is not in the model'),
        (dict(mlp_ratio=2.0), r'mlp_ratio=2\.0.*mlp_ratio=4\.0'),
    ],
)
def test_other_arch(change, message):
    refuse(MLLA(ARCH), randomised(MLLA({**ARCH, **change})), message)


def test_position_embedding_is_not_passed_over():
    state = dict(randomised(MLLA(ARCH)), absolute_pos_embed=torch.zeros(1, 256, 8))
    refuse(MLLA(ARCH), state, 'absolute_pos_embed is not in the model')


def test_file_without_statistics():
    state = randomised(MLLA(ARCH))
    del state['patch_embed.conv1.norm.running_var']
    refuse(MLLA(ARCH), state, 'conv1.norm.running_var is not in the file')


def test_init_cfg(tmp_path):
    path = tmp_path / 'published.pth'
    state = published(classifier())
    torch.save(dict(model=state), path)
    net = MLLA(ARCH, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    net.init_weights()
    assert same(net, {k: v for k, v in state.items() if k in net.state_dict()})
