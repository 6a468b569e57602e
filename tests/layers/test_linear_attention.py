import pytest
import torch
import torch.nn.functional as F

from mmvssm.layers import DepthwiseConv2d, LinearAttention2d, rotary_tables
from mmvssm.ops import linear_attention


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize('rope', [True, False])
@pytest.mark.parametrize('lepe', [True, False])
def test_attention_by_its_parts(rope, lepe):
    layer = LinearAttention2d(8, 2, rope, lepe, normalise=False).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    tokens = x.flatten(2).mT
    q, k = F.linear(tokens, layer.qk.weight, layer.qk.bias).chunk(2, dim=2)
    rotary = rotary_tables(3, 5, 8, like=x).unbind() if rope else None
    y = linear_attention(q, k, tokens, 2, rotary, normalise=False)
    want = y.mT.unflatten(2, (3, 5))
    if lepe:
        want = want + F.conv2d(
            x, layer.lepe.weight, layer.lepe.bias, padding=1, groups=8
        )
    torch.testing.assert_close(layer(x), want)
    assert ('lepe.weight' in layer.state_dict()) is lepe


def test_rows_and_columns_are_not_mixed_up():
    # Turned by 90 degrees, with the halves of channels swapped as well.
    rows = LinearAttention2d(8, 2, lepe=False)
    columns = LinearAttention2d(8, 2, lepe=False)
    swap = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
    both = torch.cat((swap, 8 + swap))
    with torch.no_grad():
        columns.qk.weight.copy_(rows.qk.weight[both][:, swap])
        columns.qk.bias.copy_(rows.qk.bias[both])
    x = torch.randn(1, 8, 3, 6)
    got = columns(x[:, swap].mT)
    torch.testing.assert_close(got, rows(x)[:, swap].mT)
    assert not torch.allclose(rows(x.mT), rows(x).mT, atol=1e-3)


@pytest.mark.parametrize('size', [(1, 1), (3, 70), (90, 2)])
def test_any_size_and_autocast(size):
    layer = LinearAttention2d(16, 4)
    x = torch.randn(2, 16, *size).to(memory_format=torch.channels_last)
    want = layer(x)
    with torch.autocast('cpu', torch.bfloat16):
        got = layer(x)
        half = layer(x.bfloat16())
    assert got.dtype == torch.float32 and half.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)
    torch.testing.assert_close(half.float(), want, atol=0.05, rtol=0.05)


def test_wrong_channels():
    for channels, heads in ((8, 3), (8, 8), (8, 0)):
        with pytest.raises(ValueError, match='heads must divide the 8 channels'):
            LinearAttention2d(channels, heads)
    with pytest.raises(ValueError, match='multiple of 4 channels, got 6'):
        LinearAttention2d(6, 3)
    LinearAttention2d(6, 6, rope=False)


def test_depthwise_convolution_sees_its_neighbours():
    conv = DepthwiseConv2d(2)
    assert conv.weight.shape == (2, 1, 3, 3) and conv.bias.shape == (2,)
    assert conv(torch.randn(1, 2, 5, 4)).shape == (1, 2, 5, 4)
