import pytest
import torch

from mmvssm.backbones import MambaR
from mmvssm.backbones.mambar import ARCH_ZOO

from .isotropic_models import TINY


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize('number', [0, 1, 3, 6, 12, 24])
@pytest.mark.parametrize('placement', ['even', 'head', 'middle'])
def test_registers(number, placement):
    net = MambaR(
        TINY, img_size=32, registers=number, placement=placement, return_tokens=True
    )
    assert net.pos_embed.shape == (1, 64, 16)
    assert ('cls_token' in net.state_dict()) is (number > 0)
    for size in ((32, 32), (20, 24), (4, 8)):
        for out, registers in net(torch.randn(2, 3, *size)):
            assert out.shape == (2, 16, size[0] // 4, size[1] // 4)
            assert registers.shape == (2, number, 16)
    out.sum().backward()


@pytest.mark.parametrize(
    'placement,places',
    [
        ('even', ([16, 33, 50], [7, 15, 23], [0, 1, 2])),
        ('head', ([0, 1, 2], [0, 1, 2], [0, 1, 2])),
        ('middle', ([32, 33, 34], [15, 16, 17], [1, 2, 3])),
    ],
)
@torch.no_grad()
def test_places_follow_the_grid(placement, places):
    """Registers are told from patches by their size as they enter the blocks."""
    net = MambaR(
        TINY, img_size=32, registers=3, placement=placement, return_tokens=True
    )
    for parameter in (net.cls_token, net.pos_embed_cls):
        parameter.fill_(100)
    entered, left = [], []
    block = net.eval().layers[0]
    block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    block.register_forward_hook(lambda _, args, out: left.append(out[0]))
    for size, expected in zip(((32, 32), (20, 24), (4, 8)), places, strict=True):
        _, registers = net(torch.randn(1, 3, *size))[0]
        large = entered.pop().mean(-1)[0] > 50
        assert large.nonzero().flatten().tolist() == expected
        # Those that come back are what the block made of them.
        assert torch.equal(registers, left.pop()[:, expected])


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
    net = MambaR(TINY, img_size=32, last_layer_process='norm')
    names = [n for n in net.state_dict() if not n.startswith('layers.')]
    assert sorted(names) == [
        'cls_token',
        'norm_f.weight',
        'patch_embed.proj.bias',
        'patch_embed.proj.weight',
        'pos_embed',
        'pos_embed_cls',
    ]
