import math

import pytest
import torch

from mmvssm.layers import BidirectionalMamba, MambaBlock
from mmvssm.layers import bimamba as module
from mmvssm.ops import bidirectional_scan


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@torch.no_grad()
def test_initialisation():
    mixer = BidirectionalMamba(96)
    assert mixer.x_proj.weight.shape == (6 + 32, 192)
    for dt_proj in (mixer.dt_proj, mixer.dt_proj_b):
        assert dt_proj.weight.abs().max() <= 6**-0.5
        assert dt_proj.weight.std() == pytest.approx(6**-0.5 / 3**0.5, rel=0.05)
        step = torch.nn.functional.softplus(dt_proj.bias)
        assert 1e-3 * 0.99 <= step.min() and step.max() <= 0.1 * 1.01
        assert step.log().mean() == pytest.approx(math.log(1e-2), abs=0.3)
    for A_log, D in ((mixer.A_log, mixer.D), (mixer.A_b_log, mixer.D_b)):
        torch.testing.assert_close(A_log.exp(), torch.arange(1.0, 17).expand(192, 16))
        assert (D == 1).all()
    for layer in (mixer.in_proj, mixer.x_proj, mixer.out_proj):
        assert layer.bias is None
        bound = layer.in_features**-0.5
        assert 0.99 * bound < layer.weight.abs().max() <= bound
    # The two directions share no memory.
    pointers = [p.data_ptr() for p in mixer.parameters()]
    assert len(set(pointers)) == len(pointers)


def test_the_backward_direction_mirrors_the_forward_one():
    """With the weights exchanged, a flipped sequence gives the flipped output."""
    mixer, mirror = BidirectionalMamba(12), BidirectionalMamba(12)
    swapped = {}
    for key, value in mixer.state_dict().items():
        if '_b' in key:
            key = key.replace('_b', '', 1)
        elif key.startswith(('conv1d', 'x_proj', 'dt_proj')):
            key = key.replace('.', '_b.')
        elif key.startswith('A_'):
            key = 'A_b_log'
        elif key == 'D':
            key = 'D_b'
        swapped[key] = value
    mirror.load_state_dict(swapped)
    x = torch.randn(2, 9, 12)
    torch.testing.assert_close(mixer(x).flip(1), mirror(x.flip(1)))


def test_average_halves_the_sum():
    averaging, adding = BidirectionalMamba(8), BidirectionalMamba(8, average=False)
    adding.load_state_dict(averaging.state_dict())
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(2 * averaging(x), adding(x))


def test_scan_parameters_stay_in_float32(monkeypatch):
    calls = []

    def spy(x, z, *ways, **kwargs):
        calls.append((x, z, ways))
        return bidirectional_scan(x, z, *ways, **kwargs)

    monkeypatch.setattr(module, 'bidirectional_scan', spy)
    mixer = BidirectionalMamba(8).bfloat16()
    out = mixer(torch.randn(1, 5, 8, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    ((x, z, ways),) = calls
    assert x.dtype == z.dtype == torch.bfloat16
    # Channels last in memory: nothing is copied on the way to the scan.
    assert x.stride(1) == z.stride(1) == 1
    for way in ways:
        assert way.A.dtype == way.D.dtype == way.dt_proj_bias.dtype == torch.float32
        assert (way.A < 0).all()
        assert way.x_proj_weight.dtype == torch.bfloat16


def test_block_adds_before_it_norms():
    block = MambaBlock(8)
    x, residual = torch.randn(2, 1, 5, 8)
    out, stream = block(x, residual)
    torch.testing.assert_close(stream, x + residual)
    normed = torch.nn.functional.rms_norm(stream, (8,), block.norm.weight, 1e-5)
    torch.testing.assert_close(out, block.mixer(normed))
    out, stream = block(x, None)
    assert torch.equal(stream, x)


@pytest.mark.parametrize('in_fp32', [False, True])
def test_dtype_of_the_stream(in_fp32):
    block = MambaBlock(8, residual_in_fp32=in_fp32).bfloat16()
    out, stream = block(torch.randn(1, 5, 8, dtype=torch.bfloat16), None)
    assert out.dtype == torch.bfloat16
    assert stream.dtype == (torch.float32 if in_fp32 else torch.bfloat16)


def test_drop_path_acts_on_what_comes_in():
    block = MambaBlock(8, drop_path=0.5)
    x, residual = torch.randn(2, 64, 3, 8)
    _, stream = block(x, residual)
    kept = (stream - residual).abs().amax((1, 2)) > 0
    assert 0 < kept.sum() < 64
    torch.testing.assert_close(stream[kept], residual[kept] + 2 * x[kept])
    # The first block has no branch before it.
    assert torch.equal(block(x, None)[1], x)
    assert torch.equal(block.eval()(x, residual)[1], x + residual)


def copied(directions, **weights):
    """A mixer of these directions, with the weights of a bidirectional one."""
    both = BidirectionalMamba(8)
    mixer = BidirectionalMamba(8, directions=directions)
    mixer.load_state_dict(
        {key: both.state_dict()[weights.get(key, key)] for key in mixer.state_dict()}
    )
    return both, mixer


@torch.no_grad()
def test_two_directions_are_the_sum_of_single_ones():
    both, forward = copied('forward')
    backward = BidirectionalMamba(8, directions='backward')
    own = {'A_log': 'A_b_log', 'D': 'D_b'}
    for key in backward.state_dict():
        layer, _, kind = key.partition('.')
        if layer in ('conv1d', 'x_proj', 'dt_proj'):
            own[key] = f'{layer}_b.{kind}'
    weights = both.state_dict()
    backward.load_state_dict({k: weights[own.get(k, k)] for k in backward.state_dict()})
    x = torch.randn(2, 7, 8)
    torch.testing.assert_close(2 * both(x), forward(x) + backward(x))


@torch.no_grad()
def test_single_directions_see_one_side():
    x = torch.randn(1, 7, 8)
    other = x.clone()
    other[:, 3] += 1
    for directions, seen in (('forward', slice(3)), ('backward', slice(4, None))):
        _, mixer = copied(directions)
        changed = (mixer(x) - mixer(other)).abs().amax(2)[0] > 1e-6
        assert not changed[seen].any() and changed.sum() == 4
        assert 'x_proj_b.weight' not in mixer.state_dict()


@torch.no_grad()
def test_scans_that_share_a_convolution():
    both, mixer = copied('shared_conv')
    assert set(both.state_dict()) - set(mixer.state_dict()) == {
        'conv1d_b.weight',
        'conv1d_b.bias',
    }
    x = torch.randn(2, 7, 8)
    seen, z = mixer.in_proj(x).chunk(2, dim=-1)
    u = torch.nn.functional.silu(mixer.conv1d(seen.mT)[..., :7])

    def scan(u, x_proj, dt_proj, A_log, D):
        rank = dt_proj.in_features
        dt, B, C = x_proj(u.mT).split((rank, 16, 16), dim=-1)
        dt = torch.nn.functional.softplus(dt_proj(dt))
        state, out = torch.zeros(2, 16, 16), []
        for t in range(7):
            decay = (dt[:, t, :, None] * -A_log.exp()).exp()
            gain = (dt[:, t] * u[..., t])[..., None] * B[:, t, None]
            state = decay * state + gain
            out.append((state * C[:, t, None]).sum(-1) + D * u[..., t])
        return torch.stack(out, dim=1)

    y = scan(u, mixer.x_proj, mixer.dt_proj, mixer.A_log, mixer.D)
    back = (mixer.x_proj_b, mixer.dt_proj_b, mixer.A_b_log, mixer.D_b)
    y = (y + scan(u.flip(2), *back).flip(1)) / 2
    want = mixer.out_proj(y * torch.nn.functional.silu(z))
    torch.testing.assert_close(mixer(x), want, atol=1e-6, rtol=1e-4)
    both.conv1d_b.load_state_dict(both.conv1d.state_dict())
    assert not torch.allclose(mixer(x), both(x))


def test_unknown_directions():
    with pytest.raises(ValueError, match="one of .*'shared_conv'.*: 'none'"):
        BidirectionalMamba(8, directions='none')
