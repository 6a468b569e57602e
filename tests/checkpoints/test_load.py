import copy

import pytest
import torch
from mmengine.registry import init_default_scope

import mmvssm
from mmvssm.backbones import VSSM, vssm
from mmvssm.checkpoints import CheckpointError, load_checkpoint
from parity import Case

from .files import (
    V0,
    V2,
    Segmentor,
    classifier,
    published,
    randomised,
    refuse,
    same,
    to_v0_old,
)


def head_of(state):
    return {k: v for k, v in state.items() if k.startswith('classifier.')}


def body_of(state):
    return {k: v for k, v in state.items() if not k.startswith('classifier.')}


# --------------------------------------------------------- formats and contents
@pytest.mark.parametrize(
    'arch, convert, file_format',
    [
        (V2, dict, 'v2'),
        (V0, dict, 'v0-new'),
        (V0, to_v0_old, 'v0-old'),
    ],
    ids=['v2', 'v0-new', 'v0-old'],
)
def test_classifier_file(arch, convert, file_format):
    net = classifier(arch)
    state = published(net)
    report = load_checkpoint(net, convert(state))
    assert (report.family, report.format, report.contents) == (
        'VMamba',
        file_format,
        'classifier',
    )
    assert sorted(report.matched) == sorted(net.state_dict())
    assert not report.missing and not report.unexpected
    assert same(net, body_of(state), 'backbone.') and same(net, head_of(state))


@pytest.mark.parametrize('arch, convert', [(V2, dict), (V0, to_v0_old)])
def test_classifier_file_into_a_backbone(arch, convert):
    net = VSSM(arch)
    state = published(classifier(arch))
    report = load_checkpoint(net, convert(state))
    assert same(net, body_of(state))
    assert report.missing == [
        f'outnorm{i}.{leaf}' for i in range(4) for leaf in ('weight', 'bias')
    ]
    assert sorted(report.unexpected) == sorted(head_of(state))
    text = str(report)
    for part in (
        'VMamba classifier',
        'outnorm0.* (2)',
        'new by design, as initialised: outnorm0.* (2)',
        'classifier.* (4)',
    ):
        assert part in text


def test_backbone_file_into_a_classifier():
    net = classifier(V2)
    report = load_checkpoint(net, published(VSSM(V2)))
    assert report.contents == 'backbone'
    assert {key.split('.')[0] for key in report.missing} == {'classifier'}
    assert {key.split('.')[0] for key in report.unexpected} == {
        f'outnorm{i}' for i in range(4)
    }
    assert 'new by design' not in str(report)


def test_whole_segmentor():
    state = randomised(Segmentor(V2))
    net = Segmentor(V2)
    report = load_checkpoint(net, state)
    assert report.contents == 'segmentor'
    assert same(net, state) and not report.missing and not report.unexpected

    net = VSSM(V2)
    report = load_checkpoint(net, state)
    assert not report.missing
    assert report.unexpected == ['decode_head.weight', 'decode_head.bias']
    assert torch.equal(net.outnorm3.bias, state['backbone.outnorm3.bias'])


def test_classifier_file_into_a_segmentor():
    net = Segmentor(V2)
    state = published(classifier(V2))
    report = load_checkpoint(net, state)
    assert same(net, body_of(state), 'backbone.')
    assert 'decode_head.weight' in report.missing
    assert 'backbone.outnorm0.weight' in report.missing


def test_detector_file():
    state = randomised(Segmentor(V2))
    state['roi_head.bbox_head.fc.weight'] = state.pop('decode_head.weight')
    del state['decode_head.bias']
    report = load_checkpoint(VSSM(V2), state)
    assert report.contents == 'detector'
    assert report.unexpected == ['roi_head.bbox_head.fc.weight']


@pytest.mark.parametrize(
    'prefix',
    ['', 'backbone.', 'module.', '_orig_mod.', 'module.backbone.', 'model.encoder.'],
)
def test_prefixes(prefix):
    state = published(VSSM(V2))
    net = VSSM(V2)
    load_checkpoint(net, {prefix + k: v for k, v in state.items()})
    assert same(net, state)


def test_wrapped_segmentor_file_and_model():
    state = randomised(Segmentor(V2))
    net = Segmentor(V2)
    load_checkpoint(
        torch.nn.DataParallel(net), {f'module.{k}': v for k, v in state.items()}
    )
    assert same(net, state)


@pytest.mark.parametrize('key', ['state_dict', 'model', 'model_ema'])
def test_wrapper_keys(key):
    state = published(VSSM(V2))
    net = VSSM(V2)
    load_checkpoint(net, {'epoch': 3, 'optimizer': {}, key: state})
    assert same(net, state)


def test_several_backbones_need_a_prefix():
    student, teacher = published(VSSM(V2)), published(VSSM(V2))
    state = {f'student.{k}': v for k, v in student.items()}
    state.update({f'teacher.{k}': v for k, v in teacher.items()})
    net = VSSM(V2)
    with pytest.raises(CheckpointError, match='student.*teacher.*prefix='):
        load_checkpoint(net, state)
    load_checkpoint(net, state, prefix='teacher.')
    assert same(net, teacher)
    with pytest.raises(CheckpointError, match="no keys with the prefix 'pupil.'"):
        load_checkpoint(net, state, prefix='pupil.')


def test_fewer_stages_than_the_file():
    net = VSSM(V2, out_indices=(0, 1))
    state = published(VSSM(V2))
    report = load_checkpoint(net, state)
    assert not report.missing
    assert {key.split('.')[0] for key in report.unexpected} == {
        'layers',
        'outnorm2',
        'outnorm3',
    }
    assert torch.equal(
        net.layers[0].downsample[1].weight, state['layers.0.downsample.1.weight']
    )


def test_convolutions_of_published_linears():
    state = published(VSSM(V2))
    four_d = {
        key: value[:, :, None, None]
        if key.endswith(
            ('fc1.weight', 'fc2.weight', 'in_proj.weight', 'out_proj.weight')
        )
        else value
        for key, value in state.items()
    }
    assert max(v.ndim for k, v in four_d.items() if '.mlp.' in k) == 4
    net = VSSM(V2)
    load_checkpoint(net, four_d)
    assert same(net, state)


@pytest.mark.parametrize('name', ['vmamba_t_s1l8', 'vmamba_t_v0'])
def test_published_arch_is_named(name):
    with torch.device('meta'):
        shapes = mmvssm.build_backbone(name).state_dict()
    assert vssm.FAMILY.describe(shapes) == name


# ---------------------------------------------------- refusals change no weight
@pytest.mark.parametrize(
    'case, family',
    [
        ('vim_t_logits', 'Vim'),
        ('vim_t_seg_feats', 'Vim'),
        ('mambar_t_logits', 'Mamba-R'),
        ('mambar_s_logits', 'Mamba-R'),
        ('mlla_t_logits', 'MLLA'),
        ('mlla_t_feats', 'MLLA'),
    ],
)
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_other_family(case, family, prefix):
    state = {prefix + name: torch.zeros(1) for name, _ in Case(case).meta['state_dict']}
    refuse(VSSM(V2), state, f'holds {family} weights.*VSSM is VMamba')


def test_no_family():
    refuse(VSSM(V2), {'conv1.weight': torch.zeros(1)}, 'none of the families')
    with pytest.raises(CheckpointError, match='model Conv2d belongs to none'):
        load_checkpoint(torch.nn.Conv2d(1, 1, 1), published(VSSM(V2)))


@pytest.mark.parametrize(
    'change, message',
    [
        (
            dict(dims=16),
            'file looks like a VMamba with .*dims=16.*the model '
            'like a VMamba with .*dims=8.*x3x3x3 in the file',
        ),
        (
            dict(depths=(1, 3, 1, 1)),
            r'depths=\(1, 3, 1, 1\).*depths=\(1, 2, 1, 1\)'
            r'.*layers\.1\.blocks\.2\.\S+ is not in the model.* more$',
        ),
        (dict(depths=(1, 1, 1, 1)), r'layers\.1\.blocks\.1\.\S+ is not in the file'),
        (dict(depths=(1, 2, 1)), r'layers\.2\.downsample\.1\.\S+ is not in the file'),
        (dict(ssm_ratio=2.0), 'ssm_ratio=2.0.*ssm_ratio=1.0'),
        (dict(mlp_ratio=0.0), r'norm2\.weight is not in the file'),
        (dict(downsample_version='v1'), 'downsample.*is not in the file'),
        (dict(patchembed_version='v1'), 'patch_embed.0.weight is 8x3x4x4'),
    ],
)
def test_other_arch(change, message):
    arch = {**V2, **change}
    other = VSSM(arch, out_indices=range(len(arch['depths'])))
    refuse(VSSM(V2), published(other), message)


def test_position_embedding_is_not_passed_over():
    file = published(VSSM(V2))
    file['pos_embed'] = torch.zeros(1, 8, 14, 14)
    refuse(VSSM(V2), file, 'does not fit.*pos_embed is not in the model')


def test_published_arch_of_a_misfit_is_named():
    file = published(mmvssm.build_backbone('vmamba_t_s1l8'))
    refuse(VSSM(V2), file, 'the file looks like vmamba_t_s1l8')


def test_other_number_of_classes():
    state = published(classifier(V2, 7))
    net = classifier(V2, 5)
    before = copy.deepcopy(net.classifier.head.state_dict())
    report = load_checkpoint(net, state)
    note = 'classifier.head has 7 outputs in the file and 5 in the model'
    assert report.notes[0].startswith(note)
    assert same(net.classifier.head, before)
    assert torch.equal(net.classifier.norm.weight, state['classifier.norm.weight'])
    assert same(net.backbone, body_of(state))
    report = load_checkpoint(Segmentor(V2, 5), randomised(Segmentor(V2, 7)))
    assert 'decode_head has 7 outputs' in report.notes[0]


def test_other_number_of_classes_strictly():
    net = classifier(V2, 5)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(CheckpointError, match='classifier.head has 7 outputs'):
        load_checkpoint(net, published(classifier(V2, 7)), strict=True)
    assert same(net, before)


def test_head_of_another_width():
    state = published(classifier(V2, 5))
    state['classifier.head.weight'] = torch.zeros(5, 32)
    refuse(classifier(V2, 5), state, 'head of another shape: .*head.weight is 5x32')


def test_strict_refuses_what_is_lacking():
    state = published(classifier(V2, 5))
    del state['classifier.norm.weight']
    net = classifier(V2, 5)
    assert 'not loaded, as initialised: classifier.* (1)' in str(
        load_checkpoint(net, state)
    )
    with pytest.raises(CheckpointError, match='lacks 1 tensors .*classifier.norm'):
        load_checkpoint(net, state, strict=True)
    # Files of classifiers have no output norms, and cannot.
    load_checkpoint(VSSM(V2), published(classifier(V2)), strict=True)


# ------------------------------------------------------------------ pretrained
def test_init_cfg(tmp_path):
    state = published(classifier(V0))
    path = tmp_path / 'published.pth'
    torch.save(dict(model=to_v0_old(state)), path)
    net = VSSM(V0, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    net.init_weights()
    assert same(net, body_of(state))


def test_init_cfg_reports(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(
        'mmvssm.backbones.base.print_log', lambda text, logger: lines.append(text)
    )
    path = tmp_path / 'published.pth'
    torch.save(published(classifier(V2)), path)
    VSSM(V2, init_cfg=dict(type='Pretrained', checkpoint=path)).init_weights()
    assert len(lines) == 1 and 'outnorm0.*' in lines[0]


def test_init_cfg_after_other_initialisers(tmp_path):
    state = published(VSSM(V2))
    path = tmp_path / 'segmentor.pth'
    teacher = {f'teacher.{k}': v for k, v in published(VSSM(V2)).items()}
    torch.save({**{f'student.{k}': v for k, v in state.items()}, **teacher}, path)
    net = VSSM(
        V2,
        init_cfg=[
            dict(type='Constant', layer=['Conv2d', 'Linear', 'LayerNorm'], val=7.0),
            dict(type='Pretrained', checkpoint=path, prefix='student.'),
        ],
    )
    net.init_weights()
    assert same(net, state)


def test_init_cfg_that_does_not_fit(tmp_path):
    path = tmp_path / 'other.pth'
    torch.save(published(VSSM(V0)), path)
    net = VSSM(V2, init_cfg=dict(type='Pretrained', checkpoint=path))
    with pytest.raises(CheckpointError, match='does not fit'):
        net.init_weights()
    net = VSSM(V2, init_cfg=dict(type='Pretrained', checkpoint='missing.pth'))
    with pytest.raises(CheckpointError, match='no checkpoint at .*missing.pth'):
        net.init_weights()


def test_init_cfg_inside_a_segmentor(tmp_path):
    mmseg_models = pytest.importorskip('mmseg.registry').MODELS
    pytest.importorskip('mmseg.models')
    # Another test may have left mmdet's.
    init_default_scope('mmseg')
    path = tmp_path / 'published.pth'
    state = published(classifier(V2))
    torch.save(state, path)
    head = dict(
        type='FCNHead',
        in_channels=64,
        channels=8,
        num_classes=3,
        in_index=3,
        norm_cfg=dict(type='BN'),
    )
    net = mmseg_models.build(
        dict(
            type='EncoderDecoder',
            backbone=dict(
                type='mmvssm.VSSM',
                arch=V2,
                init_cfg=dict(type='Pretrained', checkpoint=str(path)),
            ),
            decode_head=head,
        )
    )
    net.init_weights()
    assert same(net, body_of(state), 'backbone.')

    whole = randomised(net)
    report = load_checkpoint(net, dict(state_dict=whole, meta={}))
    assert report.contents == 'segmentor' and same(net, whole)


DTYPES = sorted(
    {d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str
)


@pytest.mark.filterwarnings('ignore:ComplexHalf', 'ignore:torch.quantize')
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_a_weight_of_any_dtype_is_taken_or_refused(dtype):
    state = published(classifier(V2))
    key = 'classifier.head.weight'
    try:
        state[key] = torch.ones(state[key].shape).to(dtype)
    except (RuntimeError, NotImplementedError):
        try:
            state[key] = torch.empty(state[key].shape, dtype=dtype)
        except (RuntimeError, NotImplementedError):
            pytest.skip('torch makes no such tensor')
    net = classifier(V2)
    if dtype.is_floating_point and 'float4' not in str(dtype):
        load_checkpoint(net, state)
        assert (net.state_dict()[key] == 1).all()
        state[key] = (torch.ones(5, 64) * float('nan')).to(dtype)
        refuse(net, state, 'NaN or infinite')
    else:
        refuse(net, state, 'cannot be used|does not fit|head')
