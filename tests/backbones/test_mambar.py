import pytest
import torch

from mmvssm.backbones import MambaR
from mmvssm.backbones.mambar import ARCH_ZOO

from .plain_models import TINY


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize('number', [0, 1, 3, 6, 12, 24])
@pytest.mark.parametrize('placement', ['even', 'head', 'middle'])
def test_registers(number, placement):
    net = MambaR(TINY, 32, registers=number, placement=placement, return_tokens=True)
    assert net.pos_embed.shape == (1, 64, 16)
    assert ('cls_token' in net.state_dict()) is (number > 0)
    for size in ((32, 32), (20, 24), (4, 8)):
        for out, registers in net(torch.randn(2, 3, *size)):
            assert out.shape == (2, 16, size[0] // 4, size[1] // 4)
            assert registers.shape == (2, number, 16)
    out.sum().backward()


@torch.no_grad()
def test_places_follow_the_grid():
    """Registers are told from patches by their size as they enter the blocks."""
    net = MambaR(TINY, 32, registers=3).eval()
    for parameter in (net.cls_token, net.pos_embed_cls):
        parameter.fill_(100)
    found = []
    net.layers[0].register_forward_pre_hook(lambda _, args: found.append(args[0]))
    for size, places in (
        ((32, 32), [16, 33, 50]),
        ((20, 24), [7, 15, 23]),
        ((4, 8), [0, 1, 2]),
    ):
        net(torch.randn(1, 3, *size))
        large = found.pop().mean(-1)[0] > 50
        assert large.nonzero().flatten().tolist() == places


def test_registers_of_the_archs():
    assert {name: arch['registers'] for name, arch in ARCH_ZOO.items()} == dict(
        t=12, s=12, b=12, l=16
    )
    assert MambaR(dict(TINY, registers=5)).num_registers == 5
    assert MambaR(dict(TINY, registers=5), registers=2).num_registers == 2


def test_wrong_registers():
    with pytest.raises(ValueError, match='registers must not be negative, got -1'):
        MambaR(TINY, registers=-1)
    with pytest.raises(ValueError, match="placement must be one of .*got 'ends'"):
        MambaR(TINY, placement='ends')


def test_published_names():
    net = MambaR(TINY, 32, last_layer_process='norm')
    names = [n for n in net.state_dict() if not n.startswith('layers.')]
    assert sorted(names) == [
        'cls_token',
        'norm_f.weight',
        'patch_embed.proj.bias',
        'patch_embed.proj.weight',
        'pos_embed',
        'pos_embed_cls',
    ]
