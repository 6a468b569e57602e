"""Files that differ from the model in channels, copies or grids; what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F

import mmvssm
from mmvssm.backbones import MLLA, VSSM, Vim
from mmvssm.checkpoints import (
    CheckpointError,
    convert,
    load_checkpoint,
    save_checkpoint,
)
from mmvssm.layers import resize_position

from .files import V0, V2, classifier, published, randomised, refuse, same

PLAIN = dict(embed_dims=16, depth=2, patch_size=4, stride=4, d_state=4)


def body_of(state):
    return {k: v for k, v in state.items() if not k.startswith('classifier.')}


# -------------------------------------------------------------- image channels
STEMS = {
    'vmamba': (lambda n: VSSM(V2, in_channels=n), 'patch_embed.0.weight'),
    'vmamba v0': (lambda n: VSSM(V0, in_channels=n), 'patch_embed.0.weight'),
    'vim': (
        lambda n: Vim(PLAIN, img_size=16, in_channels=n),
        'patch_embed.proj.weight',
    ),
    'mlla': (
        lambda n: MLLA(
            dict(depths=(1, 1), dims=8, num_heads=(1, 2)),
            in_channels=n,
            out_indices=(0, 1),
        ),
        'patch_embed.conv1.conv.weight',
    ),
}


@pytest.mark.parametrize('stem', STEMS)
@pytest.mark.parametrize(
    'shape', [(-1, 1, 1, 1), (1, -1), (1, 1, 1, 1, -1), (1, 1, 1, -1)], ids=str
)
def test_stem_of_other_dimensions(stem, shape):
    """As any other weight of another shape, and also a bias or a norm."""
    build, _ = STEMS[stem]
    state = randomised(build(3))
    for key in state:
        if key.startswith('patch_embed.') and state[key].ndim:
            value = state[key].reshape(shape)
            refuse(build(3), {**state, key: value}, 'does not fit the model')


@pytest.mark.parametrize('stem', STEMS)
@pytest.mark.parametrize('old, new', [(3, 1), (3, 4), (3, 7), (1, 3), (4, 2)])
def test_other_number_of_channels(stem, old, new):
    build, key = STEMS[stem]
    state = randomised(build(old))
    net = build(new)
    report = load_checkpoint(net, state)
    weight = net.state_dict()[key]
    (note,) = [note for note in report.notes if 'image channels' in note]
    assert f'{old} image channels to {new}' in note
    # A grey image in as many channels gives what it gave.
    grey = torch.rand(1, 1, *weight.shape[2:])
    got = F.conv2d(grey.expand(-1, new, -1, -1), weight)
    want = F.conv2d(grey.expand(-1, old, -1, -1), state[key])
    if new == 1 or new % old == 0 or old == 1:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for i in range(new if new > 1 else 0):
        torch.testing.assert_close(weight[:, i], state[key][:, i % old] * old / new)


# ---------------------------------------------------------------- not finite
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_not_finite(value):
    state = published(classifier(V2))
    key = 'layers.1.blocks.0.op.A_logs'
    state[key][3] = value
    refuse(classifier(V2), state, f'holds NaN or infinite weights: {key}')
    net = classifier(V2)
    load_checkpoint(net, state, allow_nan=True)
    assert not net.backbone.layers[1].blocks[0].op.A_logs.isfinite().all()


# ---------------------------------------------------------- several backbones
def test_prefix_chooses_among_backbones_of_the_model():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher, self.student = VSSM(V2), VSSM(V2)

    net = Two()
    before = copy.deepcopy(net.teacher.state_dict())
    refuse(net, published(VSSM(V2)), 'choose one with prefix=')
    state = published(VSSM(V2))
    report = load_checkpoint(net, state, prefix='student.')
    assert same(net.student, state) and same(net.teacher, before)
    assert all(name.startswith('student.') for name in report.matched)
    both = randomised(Two())
    load_checkpoint(net, both, prefix='teacher.')
    assert torch.equal(net.teacher.outnorm0.bias, both['teacher.outnorm0.bias'])
    assert same(net.student, state)


def test_arch_to_set():
    with torch.device('meta'):
        sibling = mmvssm.build_backbone('vmamba_t_s2l5')
        net = mmvssm.build_backbone('vmamba_t_s1l8')
    file = {k: torch.zeros(v.shape) for k, v in sibling.state_dict().items()}
    with pytest.raises(CheckpointError, match="Set arch='t_s2l5' to load it"):
        load_checkpoint(net, file)


# ----------------------------------------------------------- averaged weights
def test_weights(tmp_path):
    raw, ema = published(classifier(V2)), published(classifier(V2))
    torch.save(dict(model=raw, model_ema=ema), tmp_path / 'both.pth')
    net = classifier(V2)
    report = load_checkpoint(net, tmp_path / 'both.pth')
    assert same(net.backbone, body_of(raw)) and report.copy == 'model'
    assert 'weights: model; the file also holds model_ema' in str(report)
    report = load_checkpoint(net, tmp_path / 'both.pth', weights='ema')
    assert same(net.backbone, body_of(ema)) and report.copy == 'model_ema'
    cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'both.pth'), weights='ema')
    net = VSSM(V2, init_cfg=cfg)
    net.init_weights()
    assert same(net, body_of(ema))


# ------------------------------------------------- grids of position embeddings
def plain_vim(img_size):
    return Vim(PLAIN, img_size=img_size)


@pytest.mark.parametrize('form', ['torch.save', '.pth', '.safetensors', 'segmentor'])
def test_own_files_say_their_grid(tmp_path, form):
    """8x32 patches are as many as 32x8, and as 16x16."""
    source = plain_vim((32, 128))
    torch.nn.init.normal_(source.pos_embed)
    path = tmp_path / 'own.pth'
    if form == 'torch.save':
        torch.save(source.state_dict(), path)
    elif form == 'segmentor':
        whole = torch.nn.Module()
        whole.backbone, whole.decode_head = source, torch.nn.Conv2d(16, 2, 1)
        torch.save(dict(state_dict=whole.state_dict()), path)
    else:
        path = tmp_path / f'own{form}'
        save_checkpoint(convert(source.state_dict()), path)
    same_size = plain_vim((32, 128))
    assert not load_checkpoint(same_size, path).notes
    assert torch.equal(same_size.pos_embed, source.pos_embed)
    turned = plain_vim((128, 32))
    report = load_checkpoint(turned, path)
    assert report.notes == ['pos_embed was resized from 8x32 to 32x8']
    want = resize_position(source.pos_embed, (8, 32), (32, 8))
    assert torch.equal(turned.pos_embed, want)


def test_grid_of_a_foreign_file_is_assumed_and_said():
    state = randomised(plain_vim((64, 64)))
    report = load_checkpoint(plain_vim((32, 128)), state)
    assert report.notes == ['pos_embed was resized from 16x16 to 8x32']
    state = randomised(plain_vim((24, 40)))
    report = load_checkpoint(plain_vim((40, 24)), state)
    assert report.notes == [
        "pos_embed was taken to be for the model's grid of 10x6: the file does not say"
    ]
