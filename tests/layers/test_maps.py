import pytest
import torch
import torch.nn.functional as F

from mmvssm.layers import LayerNorm2d, Linear2d, Mlp2d


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last])
def x(request):
    torch.manual_seed(0)
    return torch.randn(2, 6, 5, 7).contiguous(memory_format=request.param)


def test_layer_norm(x):
    norm = LayerNorm2d(6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    mean = x.mean(1, keepdim=True)
    std = (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    want = (x - mean) / std * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), want)


def test_linear_is_a_1x1_convolution(x):
    linear = Linear2d(6, 4)
    want = F.conv2d(x, linear.weight[:, :, None, None], linear.bias)
    torch.testing.assert_close(linear(x), want)


def test_linear_loads_a_convolution(x):
    conv, linear = torch.nn.Conv2d(6, 4, 1), Linear2d(6, 4)
    state = conv.state_dict()
    linear.load_state_dict(state)
    torch.testing.assert_close(linear(x), conv(x))
    # The caller's dict is left as it was.
    assert state['weight'].ndim == 4


def test_linear_refuses_larger_kernels():
    with pytest.raises(RuntimeError, match='size mismatch'):
        Linear2d(6, 4).load_state_dict(torch.nn.Conv2d(6, 4, 3).state_dict())


@pytest.mark.parametrize(
    'layer',
    [LayerNorm2d(6), Linear2d(6, 4), Mlp2d(6, 12)],
    ids=lambda m: type(m).__name__,
)
def test_channels_last_stays(layer):
    x = torch.randn(2, 6, 5, 7).contiguous(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_mlp(x):
    mlp = Mlp2d(6, 24)
    want = mlp.fc2(F.gelu(mlp.fc1(x)))
    torch.testing.assert_close(mlp(x), want)
    assert mlp(x).shape == x.shape and mlp.fc1.weight.shape == (24, 6)
