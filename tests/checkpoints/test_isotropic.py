"""Checkpoints of Vim and Mamba®: names, tokens, grids."""

import pytest
import torch
import torch.nn.functional as F

import mmvssm
from mmvssm.backbones import MambaR, Vim
from mmvssm.checkpoints import (
    convert,
    load_checkpoint,
    save_checkpoint,
)
from mmvssm.families import recognise
from parity import Case

from .files import randomised, refuse, same
from .isotropic_files import (
    ARCH,
    Detector,
    Segmentor,
    mambar_classifier,
    published,
    published_detector,
    published_segmentor,
    vim_classifier,
)

CLASSIFIERS = {'Vim': vim_classifier, 'Mamba-R': mambar_classifier}
each_family = pytest.mark.parametrize('family', CLASSIFIERS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def bicubic(embedding, old, new):
    grid = embedding.reshape(1, old, old, -1).movedim(-1, 1)
    grid = F.interpolate(grid, size=(new, new), mode='bicubic', align_corners=False)
    return grid.movedim(1, -1).reshape(1, new * new, -1)


def without(state, *names):
    return {k: v for k, v in state.items() if not k.startswith(names)}


# ----------------------------------------------------------- names and contents
@each_family
def test_classifier_file(family):
    net = CLASSIFIERS[family]()
    state = published(net)
    assert {'head.weight', 'norm_f.weight', 'pos_embed'} <= set(state)
    report = load_checkpoint(net, dict(model=state))
    assert (report.family, report.contents) == (family, 'classifier')
    assert not report.missing and not report.unexpected and not report.notes
    for key, value in net.state_dict().items():
        short = key.removeprefix('backbone.').removeprefix('classifier.')
        assert torch.equal(value, state[short]), key


@each_family
def test_conversion_is_idempotent(family, tmp_path):
    net = CLASSIFIERS[family]()
    first = convert(published(net))
    second = convert(first.state_dict())
    assert first.renamed and not second.renamed
    assert list(second.state_dict()) == list(first.state_dict())
    path = tmp_path / 'weights.safetensors'
    save_checkpoint(first, path)
    assert not load_checkpoint(net, path).missing


@pytest.mark.parametrize(
    'name', [n for n in mmvssm.list_models() if n.startswith(('vim', 'mambar'))]
)
def test_published_arch_is_named(name):
    with torch.device('meta'):
        shapes = mmvssm.build_backbone(name).state_dict()
    family = recognise(shapes, 'the model').family
    # A stride leaves no trace in the weights.
    assert family.describe(shapes) == name.removesuffix('_stride8')


@each_family
def test_own_backbone_file_into_a_classifier_and_back(family):
    net = CLASSIFIERS[family]()
    dense = Vim(ARCH, img_size=56) if family == 'Vim' else MambaR(ARCH, img_size=56)
    state = randomised(dense)
    report = load_checkpoint(net, state)
    assert report.contents == 'backbone'
    assert same(net, without(state, 'pos_embed'), 'backbone.')
    assert 'classifier.head.weight' in report.missing

    whole = randomised(net)
    report = load_checkpoint(dense, whole)
    assert not report.missing
    assert same(
        dense,
        {
            k: v
            for k, v in published_backbone(whole).items()
            if k in dense.state_dict() and k != 'pos_embed'
        },
    )


def published_backbone(state):
    return {k.removeprefix('backbone.'): v for k, v in state.items()}


@each_family
@pytest.mark.parametrize('prefix', ['', 'module.', 'module.backbone.'])
def test_prefixes(family, prefix):
    net = CLASSIFIERS[family]().backbone
    state = randomised(net)
    load_checkpoint(net, {prefix + k: v for k, v in state.items()})
    assert same(net, state)


# ------------------------------------------------------------- the segmentation
@pytest.mark.parametrize('cls', [Vim, MambaR])
def test_published_segmentor(cls):
    net = Segmentor(cls(ARCH, img_size=56))
    state = published_segmentor(net)
    report = load_checkpoint(net, dict(state_dict=state))
    assert report.contents == 'segmentor'
    assert not report.missing and report.unexpected == ['norm_f.weight']
    for key, value in net.state_dict().items():
        old = key.replace('neck.upsample_4x.', 'backbone.fpn1.')
        old = old.replace('neck.upsample_2x.', 'backbone.fpn2.')
        assert torch.equal(value, state[old]), key


def test_pyramid_of_a_bare_backbone_file():
    """As the backbone alone was saved, without prefix."""
    net = Segmentor(Vim(ARCH, img_size=56))
    state = {
        k.removeprefix('backbone.'): v
        for k, v in published_segmentor(net).items()
        if k.startswith('backbone.')
    }
    checkpoint = convert(state)
    assert (checkpoint.format, checkpoint.contents) == ('vim-fpn', 'model')
    assert 'neck.upsample_4x.0.weight' in checkpoint.state_dict()
    report = load_checkpoint(net, state)
    assert report.missing == ['decode_head.weight', 'decode_head.bias']
    again = convert(checkpoint.state_dict())
    assert again.renamed == 0
    assert list(again.state_dict()) == list(checkpoint.state_dict())


def test_pyramid_into_a_model_without_neck():
    net = Vim(ARCH, img_size=56)
    report = load_checkpoint(
        net, published_segmentor(Segmentor(Vim(ARCH, img_size=56)))
    )
    assert not report.missing
    assert {key.split('.')[0] for key in report.unexpected} == {
        'norm_f',
        'neck',
        'decode_head',
    }


def test_mmseg_neck_takes_the_pyramid():
    necks = pytest.importorskip('mmseg.models.necks')
    net = Segmentor(Vim(ARCH, img_size=56))
    state = published_segmentor(net)
    net.neck = necks.Feature2Pyramid(16, norm_cfg=dict(type='BN'))
    report = load_checkpoint(net, state)
    assert not report.missing
    assert torch.equal(net.neck.upsample_4x[3].weight, state['backbone.fpn1.3.weight'])


# ---------------------------------------------------------------- the detection
def test_published_detector():
    net = Detector(Vim(ARCH, img_size=56, out_indices=(3,), rope=True))
    state = published_detector(net)
    report = load_checkpoint(net, dict(model=state))
    assert (report.format, report.contents) == ('vim-detectron2', 'detector')
    assert report.missing == ['rpn_head.weight', 'rpn_head.bias']
    assert set(report.unexpected) == {
        'rope.freqs_cos',
        'proposal_generator.rpn_head.weight',
        'proposal_generator.rpn_head.bias',
        'roi_heads.mask_head.predictor.weight',
        'pixel_mean',
    }
    assert len(report.matched) == len(net.state_dict()) - 2
    for key, value in net.backbone.state_dict().items():
        assert torch.equal(value, state[f'backbone.net.{key}']), key
    pyramid = net.neck.state_dict()
    for theirs, own in (
        ('simfp_2.0.weight', 'levels.0.0.weight'),
        ('simfp_2.1.bias', 'levels.0.1.bias'),
        ('simfp_2.4.norm.weight', 'levels.0.4.norm.weight'),
        ('simfp_4.0.weight', 'levels.2.0.weight'),
        ('simfp_5.2.norm.bias', 'levels.3.2.norm.bias'),
    ):
        assert torch.equal(pyramid[own], state[f'backbone.{theirs}']), own


def test_conversion_of_a_detector_is_idempotent():
    first = convert(
        published_detector(Detector(Vim(ARCH, img_size=56, out_indices=(3,))))
    )
    again = convert(first.state_dict())
    assert first.renamed and again.renamed == 0
    assert list(again.state_dict()) == list(first.state_dict())


def test_detector_file_into_a_backbone():
    net = Vim(ARCH, img_size=56, out_indices=(3,))
    state = published_detector(Detector(Vim(ARCH, img_size=56, out_indices=(3,))))
    assert not load_checkpoint(net, state).missing
    assert torch.equal(net.pos_embed, state['backbone.net.pos_embed'])


def test_rotary_tables_of_a_file_are_left_out():
    net = Vim(ARCH, img_size=56, rope=True)
    state = randomised(net)
    tables = {
        'rope.freqs_cos': torch.zeros(196, 16),
        'rope.freqs_sin': torch.zeros(196, 16),
    }
    report = load_checkpoint(net, state | tables)
    assert not report.missing and report.unexpected == list(tables)
    assert same(net, state)


# ------------------------------------------------ position embeddings and tokens
@pytest.mark.parametrize('old,new', [(14, 32), (32, 14), (14, 14)])
@pytest.mark.parametrize(
    'place,position', [('middle', 'half'), ('head', 0)], ids=['middle', 'head']
)
def test_dense_model_drops_the_class_token_where_it_is(old, new, place, position):
    """4 pixels a patch: 14x14 -> 32x32 and back."""
    state = published(vim_classifier(4 * old, cls_token=place))
    net = Vim(ARCH, img_size=4 * new, pretrained_cls_token=place)
    report = load_checkpoint(net, state)
    position = old * old // 2 if position == 'half' else position
    full = state['pos_embed']
    grid = torch.cat((full[:, :position], full[:, position + 1 :]), dim=1)
    want = grid if old == new else bicubic(grid, old, new)
    torch.testing.assert_close(net.pos_embed, want, rtol=1e-4, atol=1e-5)
    assert not report.missing
    assert {'cls_token', 'norm_f.weight', 'classifier.head.weight'} <= set(
        report.unexpected
    )
    text = str(report)
    assert f'without the vectors of class tokens at {position}' in text
    assert (f'resized from {old}x{old} to {new}x{new}' in text) is (old != new)


def test_the_middle_is_what_is_taken_for_granted():
    state = published(vim_classifier(56))
    net = Vim(ARCH, img_size=56)
    load_checkpoint(net, state)
    assert torch.equal(net.pos_embed[:, :98], state['pos_embed'][:, :98])
    assert torch.equal(net.pos_embed[:, 98:], state['pos_embed'][:, 99:])


@pytest.mark.parametrize('place', ['head', 'middle', 'double'])
def test_class_tokens_keep_their_vectors_when_the_grid_changes(place):
    small, large = (vim_classifier(4 * n, cls_token=place) for n in (6, 9))
    state = published(small)
    report = load_checkpoint(large, state)
    assert not report.missing and not report.unexpected
    theirs = small.backbone.token_positions(36)
    ours = large.backbone.token_positions(81)
    embedding = large.backbone.pos_embed
    for a, b in zip(theirs, ours, strict=True):
        assert torch.equal(state['pos_embed'][:, a], embedding[:, b])
    grid = state['pos_embed'][:, [i for i in range(36 + len(ours)) if i not in theirs]]
    rest = embedding[:, [i for i in range(81 + len(ours)) if i not in ours]]
    torch.testing.assert_close(rest, bicubic(grid, 6, 9), rtol=1e-4, atol=1e-5)


def test_class_token_that_the_file_does_not_have():
    net = vim_classifier(24)
    before = net.backbone.pos_embed[:, 18].clone()
    state = randomised(Vim(ARCH, img_size=24))
    report = load_checkpoint(net, state)
    assert 'backbone.cls_token' in report.missing
    embedding = net.backbone.pos_embed
    assert torch.equal(embedding[:, 18], before)
    assert torch.equal(embedding[:, 19:], state['pos_embed'][:, 18:])


@pytest.mark.parametrize('old,new', [(14, 32), (32, 14)])
def test_registers_stay_when_the_grid_changes(old, new):
    state = published(mambar_classifier(4 * old))
    net = MambaR(ARCH, img_size=4 * new)
    report = load_checkpoint(net, state)
    assert not report.missing
    want = bicubic(state['pos_embed'], old, new)
    torch.testing.assert_close(net.pos_embed, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(net.cls_token, state['cls_token'])
    assert f'resized from {old}x{old}' in str(report)


def test_rectangular_grid():
    source = Vim(ARCH, img_size=(24, 40))
    state = randomised(source)
    net = Vim(ARCH, img_size=(24, 40))
    report = load_checkpoint(net, state)
    assert same(net, state)
    # Plain tensors by name say nothing of the grid.
    assert 'was taken to be for the model' in report.notes[0]
    square = vim_classifier(56)
    load_checkpoint(Vim(ARCH, img_size=(24, 40)), published(square))
    refuse(Vim(ARCH, img_size=56), state, '60 patches, which are not a square.*14x14')


@torch.no_grad()
def test_resizing_at_load_is_resizing_in_the_forward_pass():
    state = randomised(Vim(ARCH, img_size=24))
    stored_small, stored_large = (
        Vim(ARCH, img_size=24).eval(),
        Vim(ARCH, img_size=40).eval(),
    )
    for net in (stored_small, stored_large):
        load_checkpoint(net, state)
    x = torch.randn(1, 3, 40, 40)
    for a, b in zip(stored_small(x), stored_large(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name', ['vim_t_logits', 'mambar_t_logits'])
def test_published_weights_into_the_dense_model_at_512(name):
    weights = Case(name).weights()
    net = mmvssm.build_backbone(name.removesuffix('_logits'), img_size=512)
    report = load_checkpoint(net, weights)
    assert not report.missing
    assert net.pos_embed.shape == (1, 1024, 192)
    assert '14x14 to 32x32' in str(report)


# ---------------------------------------------------- refusals change no weight
@each_family
def test_other_family(family):
    other = next(name for name in CLASSIFIERS if name != family)
    refuse(
        CLASSIFIERS[family](),
        published(CLASSIFIERS[other]()),
        f'holds {other} weights, but the model ImageClassifier is {family}',
    )


@pytest.mark.parametrize('cls', [Vim, MambaR])
@pytest.mark.parametrize(
    'change,message',
    [
        (dict(embed_dims=8), 'embed_dims=8.*embed_dims=16'),
        (dict(depth=5), 'it has 5 blocks, the arch of the model 4'),
        (dict(depth=3), r'layers\.3\.\S+ is not in the file'),
        (dict(d_state=3), 'd_state=3.*d_state=4'),
        (dict(patch_size=8), 'patch_size=8.*patch_size=4'),
    ],
)
def test_other_arch(cls, change, message):
    refuse(
        cls(ARCH, img_size=56),
        randomised(cls({**ARCH, **change}, img_size=56)),
        message,
    )


def test_first_blocks_of_the_right_arch():
    net = Vim(ARCH, img_size=56, out_indices=(1,))
    state = randomised(Vim(ARCH, img_size=56))
    report = load_checkpoint(net, state)
    assert not report.missing
    assert {key.split('.')[1] for key in report.unexpected} == {'2', '3'}


def test_other_number_of_registers():
    refuse(
        MambaR(ARCH, img_size=56, registers=6),
        randomised(MambaR(ARCH, img_size=56, registers=12)),
        'cls_token is 1x12x16 in the file and 1x6x16 in the model',
    )


def test_position_embedding_is_not_passed_over():
    with_embedding, without_it = (
        Vim(ARCH, img_size=56),
        Vim(ARCH, img_size=56, pos_embed=False),
    )
    refuse(without_it, randomised(with_embedding), 'pos_embed is not in the model')
    refuse(with_embedding, randomised(without_it), 'pos_embed is not in the file')


def test_init_cfg(tmp_path):
    path = tmp_path / 'published.pth'
    state = published(vim_classifier(56))
    torch.save(dict(model=state), path)
    net = Vim(ARCH, img_size=80, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    net.init_weights()
    assert same(net, {k: v for k, v in state.items() if k.startswith('layers.')})
    assert net.pos_embed.shape == (1, 400, 16)
