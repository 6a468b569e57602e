import pytest
import torch

import mmvssm
from mmvssm.backbones import Vim
from mmvssm.layers import resize_position

from .isotropic_models import TINY


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    'place,names,positions,length',
    [
        ('none', [], (), 64),
        ('head', ['cls_token'], (0,), 65),
        ('middle', ['cls_token'], (32,), 65),
        ('double', ['cls_token_head', 'cls_token_tail'], (0, 65), 66),
    ],
)
def test_class_tokens(place, names, positions, length):
    net = Vim(TINY, img_size=32, cls_token=place, return_tokens=True)
    assert [n for n in net.state_dict() if n.startswith('cls_token')] == names
    assert net.token_positions(64) == positions
    assert net.pos_embed.shape == (1, length, 16)
    for out, tokens in net(torch.randn(2, 3, 20, 24)):
        assert out.shape == (2, 16, 5, 6) and tokens.shape == (2, len(names), 16)


@pytest.mark.parametrize('place', ['none', 'head', 'middle', 'double'])
@torch.no_grad()
def test_position_vectors_go_where_they_belong(place):
    """Class tokens keep theirs, those of patches are resized as a grid."""
    net = Vim(TINY, img_size=32, cls_token=place)
    positions = net.token_positions(64)
    others = [i for i in range(64 + len(positions)) if i not in positions]
    for size in ((8, 8), (5, 6), (1, 3)):
        zeros = torch.zeros(1, size[0] * size[1], 16)
        patches, tokens = net.embed(zeros, size)
        grid = net.pos_embed[:, others]
        torch.testing.assert_close(patches, resize_position(grid, (8, 8), size))
        if positions:
            own = [net.state_dict()[name] for name in net.class_token_names]
            want = torch.cat(own, dim=1) + net.pos_embed[:, list(positions)]
            torch.testing.assert_close(tokens, want)
        else:
            assert tokens is None


def test_without_position_embedding():
    net = Vim(TINY, img_size=32, pos_embed=False, rope=True)
    assert 'pos_embed' not in net.state_dict()
    assert net.no_weight_decay().isdisjoint({'pos_embed'})
    net(torch.randn(1, 3, 20, 24))[0].sum().backward()
    assert net.patch_embed.proj.weight.grad.isfinite().all()


def spied_streams(net, x):
    """What goes into each block."""
    inputs = []
    for block in net.layers:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args))
    with torch.no_grad():
        net.eval()(x)
    return inputs


@pytest.mark.parametrize('residual', [False, True])
def test_rotation_before_every_block(residual):
    """Hidden states always, the stream if asked, class tokens never."""
    net = Vim(
        TINY,
        img_size=32,
        cls_token='middle',
        rope=True,
        rope_residual=residual,
        rope_grid=8,
    )
    outs = []
    for block in net.layers:
        block.register_forward_hook(lambda _, args, out: outs.append(out))
    inputs = spied_streams(net, torch.randn(1, 3, 32, 32))
    moved = [i for i in range(1, 65) if i != 32]  # position 0 has angle 0

    def turned(before, after):
        assert torch.equal(before[:, 32], after[:, 32])
        same = torch.isclose(before[:, moved], after[:, moved]).all(-1)
        return not same.any()

    for (_, before), (x, stream), (hidden, _) in zip(
        outs, inputs[1:], outs, strict=False
    ):
        assert turned(hidden, x)
        assert turned(before, stream) if residual else torch.equal(before, stream)


def test_rotation_grid():
    """A map of the size of the grid has whole steps, a larger one parts of them."""
    net = Vim(dict(TINY, embed_dims=4), img_size=32, rope=True, rope_grid=(4, 7))
    x = torch.zeros(1, 1, 4)
    cos, _ = net._rotation(x, (8, 7), ())
    angles = cos.unflatten(1, (8, 7)).acos()
    assert angles[0, 1, 0, 0].item() == pytest.approx(0.5)
    assert angles[0, 0, 1, 1].item() == pytest.approx(1.0)


def test_rope_needs_four_channels():
    with pytest.raises(ValueError, match='multiple of 4, got 6'):
        Vim(dict(TINY, embed_dims=6), rope=True)


def test_wrong_class_token():
    with pytest.raises(ValueError, match="cls_token must be one of .*got 'tail'"):
        Vim(TINY, cls_token='tail')
    with pytest.raises(ValueError, match='pretrained_cls_token must be one of'):
        Vim(TINY, pretrained_cls_token='double')


@pytest.mark.parametrize('average', [True, False])
def test_average_reaches_the_mixers(average):
    net = Vim(TINY, average=average)
    assert {block.mixer.average for block in net.layers} == {average}


@pytest.mark.parametrize('in_fp32', [True, False])
def test_dtype_of_the_stream(in_fp32):
    net = Vim(
        TINY,
        img_size=32,
        residual_in_fp32=in_fp32,
        feature='residual',
        out_indices=(0, 3),
    ).bfloat16()
    first, last = net(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16))
    assert first.dtype == (torch.float32 if in_fp32 else torch.bfloat16)
    assert last.dtype == torch.bfloat16


@pytest.mark.parametrize(
    'directions,mixers',
    [
        ('both', ['both'] * 4),
        ('shared_conv', ['shared_conv'] * 4),
        ('alternate', ['forward', 'backward', 'forward', 'backward']),
        ('forward', ['forward'] * 4),
    ],
)
def test_directions_of_the_blocks(directions, mixers, tmp_path):
    arguments = dict(img_size=16, classification=True, directions=directions)
    net = Vim(TINY, **arguments)
    assert [block.mixer.directions for block in net.layers] == mixers
    out, _ = net(torch.randn(2, 3, 16, 16))[0]
    out.square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    # Own files of all of them are known as Vim's.
    torch.save(net.state_dict(), tmp_path / 'vim.pth')
    other = Vim(TINY, **arguments)
    mmvssm.load_checkpoint(other, str(tmp_path / 'vim.pth'))
    for key, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@torch.no_grad()
def test_a_single_direction_reaches_the_end_alone():
    torch.manual_seed(0)
    image = torch.randn(1, 3, 16, 16)
    other = image.clone()
    other[..., 8:, 8:] += 1
    for directions, few in (('forward', True), ('alternate', False)):
        net = Vim(TINY, img_size=16, directions=directions, out_indices=(3,)).eval()
        (a,), (b,) = net(image), net(other)
        assert ((a - b).abs().amax(1)[0, 0] == 0).all() == few


@torch.no_grad()
@pytest.mark.parametrize('rope', [False, True])
def test_flipped_sequences(rope):
    """Forward blocks on a turned sequence do what backward blocks do."""
    torch.manual_seed(0)
    options = dict(img_size=16, cls_token='head', rope=rope, drop_path_rate=0.0)
    options.update(return_tokens=True)
    net = Vim(TINY, directions='forward', flip_sequences=1.0, **options)
    plain = Vim(TINY, directions='forward', **options)
    plain.load_state_dict(net.state_dict())
    image = torch.randn(2, 3, 16, 16)
    for flipped, straight in zip(net.eval()(image), plain(image)):
        assert all(map(torch.equal, flipped, straight))
    for block in plain.layers:
        block.mixer.directions = 'backward'
    for flipped, straight in zip(net.train()(image), plain(image)):
        for a, b in zip(flipped, straight):
            torch.testing.assert_close(a, b)
    state = torch.get_rng_state()
    plain(image)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    'arguments,message',
    [
        (dict(directions='none'), "directions must be one of .*'forward'"),
        (dict(flip_sequences=2), 'probability from 0 to 1, got 2'),
    ],
)
def test_wrong_directions(arguments, message):
    with pytest.raises(ValueError, match=message):
        Vim(TINY, **arguments)
