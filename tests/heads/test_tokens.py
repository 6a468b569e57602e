import pytest
import torch

from mmvssm.heads import ClassTokenHead, RegisterHead


@pytest.fixture
def features():
    torch.manual_seed(0)
    return torch.randn(2, 8, 3, 4), torch.randn(2, 6, 8)


def test_class_tokens(features):
    patches, tokens = features
    head = ClassTokenHead(8, 5)
    assert list(head.state_dict()) == ['head.weight', 'head.bias']
    assert torch.equal(head.pre_logits((patches, tokens[:, :1])), tokens[:, 0])
    both = head.pre_logits((patches, tokens[:, :2]))
    torch.testing.assert_close(both, (tokens[:, 0] + tokens[:, 1]) / 2)
    none = head.pre_logits((patches, tokens[:, :0]))
    torch.testing.assert_close(none, patches.flatten(2).mean(2))
    assert head((patches, tokens)).shape == (2, 5)


@torch.no_grad()
def test_reduced_registers(features):
    patches, registers = features
    head = RegisterHead(8, 5, num_registers=6, reduce=4)
    assert {k: tuple(v.shape) for k, v in head.state_dict().items()} == {
        'neck.weight': (2, 8),
        'norm_neck.weight': (12,),
        'head.weight': (5, 12),
        'head.bias': (5,),
    }
    flat = torch.cat([head.neck(r) for r in registers.unbind(1)], dim=1)
    want = torch.nn.functional.rms_norm(flat, (12,), eps=1e-5)
    torch.testing.assert_close(head.pre_logits(features), want)
    torch.testing.assert_close(head(features), head.head(want))


def test_concatenated_registers(features):
    head = RegisterHead(8, 5, num_registers=6)
    assert list(head.state_dict()) == ['head.weight', 'head.bias']
    assert torch.equal(head.pre_logits(features), features[1].reshape(2, 48))


def test_ablations(features):
    patches, registers = features
    for pooling, want in (
        ('mean', registers.mean(1)),
        ('one', registers[:, 0]),
        ('patches', patches.mean((2, 3))),
    ):
        head = RegisterHead(8, 5, num_registers=6, reduce=2, pooling=pooling)
        assert list(head.state_dict()) == ['head.weight', 'head.bias']
        torch.testing.assert_close(head.pre_logits(features), want)
        assert head(features).shape == (2, 5)


@torch.no_grad()
def test_initialisation():
    torch.manual_seed(0)
    head = RegisterHead(64, 1000, num_registers=12, reduce=2)
    for layer in (head.head, head.neck):
        assert layer.weight.std() == pytest.approx(0.02, rel=0.05)
    assert not head.head.bias.any()


@pytest.mark.parametrize(
    'arguments,message',
    [
        (dict(pooling='max'), 'pooling must be one of'),
        (dict(num_registers=0), 'needs registers'),
        (dict(reduce=3), 'reduce must divide the 8 channels'),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RegisterHead(8, 5, **arguments)


@torch.no_grad()
def test_maximum_over_the_patches(features):
    patches, tokens = features
    head = ClassTokenHead(8, 5, pooling='max')
    want = torch.stack([head.head(x) for x in patches.flatten(2).unbind(2)]).amax(0)
    torch.testing.assert_close(head((patches, tokens[:, :0])), want)
    assert head.pre_logits((patches, tokens[:, :0])).shape == (2, 12, 8)
    with pytest.raises(ValueError, match="one of \\('mean', 'max'\\), got 'sum'"):
        ClassTokenHead(8, 5, pooling='sum')


@torch.no_grad()
def test_widened_class_token(features):
    patches, tokens = features
    head = RegisterHead(8, 5, num_registers=1, widen=3)
    assert {k: tuple(v.shape) for k, v in head.state_dict().items()} == {
        'neck.weight': (24, 8),
        'norm_neck.weight': (24,),
        'head.weight': (5, 24),
        'head.bias': (5,),
    }
    wide = torch.nn.functional.rms_norm(head.neck(tokens[:, 0]), (24,), eps=1e-5)
    torch.testing.assert_close(head.pre_logits((patches, tokens[:, :1])), wide)
    with pytest.raises(ValueError, match='reduce=1 with it'):
        RegisterHead(8, 5, reduce=2, widen=3)
