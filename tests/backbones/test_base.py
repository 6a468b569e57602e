"""What every backbone says of images that it does not take; whole models in files."""

import functools
import io

import pytest
import torch
from mmengine.model import BaseModule
from torch import nn

from families import FAMILIES

every_family = pytest.mark.parametrize('name', FAMILIES)


@functools.cache
def model(name, dtype=torch.float32):
    torch.manual_seed(0)
    return FAMILIES[name]().eval().to(dtype)


def images(dtype=torch.float32, shape=(1, 3, 16, 16)):
    return torch.randint(0, 255, shape).to(dtype)


def refusal(net, x):
    with pytest.raises(ValueError) as error, torch.no_grad():
        net(x)
    (line,) = str(error.value).splitlines()
    return line


@every_family
@pytest.mark.parametrize(
    'weights, given',
    [
        (torch.float32, torch.uint8),
        (torch.float32, torch.int64),
        (torch.float32, torch.bool),
        (torch.float32, torch.float64),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_other_dtype_than_the_weights(name, weights, given):
    said = refusal(model(name, weights), images(given))
    assert said == (
        f'the weights of {type(model(name)).__name__} are {weights} and the images '
        f'{given}: pass images.to({weights}), normalised as in the training'
    )


@every_family
def test_autocast_takes_what_it_casts(name):
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        for given in (torch.float32, torch.bfloat16, torch.float16):
            assert all(x.isfinite().all() for x in model(name)(images(given)))
        for given in (torch.uint8, torch.float64):
            assert 'torch.float32' in refusal(model(name), images(given))
        assert 'are torch.float64' in refusal(model(name, torch.float64), images())


@every_family
@pytest.mark.parametrize('shape', [(3, 16, 16), (16, 16), (1, 4, 16, 16), (1, 16, 16)])
def test_other_shape(name, shape):
    said = refusal(model(name), images(shape=shape))
    assert 'takes images (B, 3, H, W) of at least' in said and str(shape) in said


@every_family
def test_images_of_four_channels(name):
    net = FAMILIES[name](in_channels=4).eval()
    with torch.no_grad():
        assert all(x.isfinite().all() for x in net(images(shape=(1, 4, 16, 16))))
    assert 'takes images (B, 4, H, W)' in refusal(net, images())


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('name', ['vmamba_v05_noz', 'vim'])
def test_no_check_in_a_graph(name):
    """What is compiled, exported or traced computes, and nothing else."""
    net, x = model(name), images(torch.bfloat16)

    def run(x):
        # Autocast, where the check has most to look at.
        with torch.autocast('cpu', torch.bfloat16):
            return net(x)

    torch._dynamo.reset()
    with torch.no_grad():
        want = run(x)
        compiled = torch.compile(run, fullgraph=True, backend='eager')
        for got, y in zip(compiled(x), want, strict=True):
            torch.testing.assert_close(got, y)
        exported = torch.export.export(net, (x.float(),)).module()
        traced = torch.jit.trace(net, x.float())
        for got, other, y in zip(
            exported(x.float()), traced(x.float()), net(x.float()), strict=True
        ):
            torch.testing.assert_close(got, y)
            torch.testing.assert_close(other, y)


class Whole(BaseModule):
    """A model whose ``init_cfg`` is for all layers of a kind, as MMPretrain's are."""

    def __init__(self, backbone):
        super().__init__([dict(type='Constant', layer='Linear', val=3.0, bias=5.0)])
        self.backbone = backbone
        self.head = nn.Linear(2, 2)


@every_family
def test_init_cfg_of_the_whole_model_leaves_the_backbone_as_published(name):
    net = Whole(FAMILIES[name]())
    before = {key: value.clone() for key, value in net.backbone.state_dict().items()}
    net.init_weights()
    assert (net.head.weight == 3).all() and (net.head.bias == 5).all()
    for key, value in net.backbone.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@every_family
def test_its_own_init_cfg_is_carried_out(name):
    net = FAMILIES[name](init_cfg=dict(type='Constant', layer='Linear', val=3.0))
    net.init_weights()
    linears = [x for x in net.modules() if isinstance(x, nn.Linear)]
    assert linears and all((x.weight == 3).all() for x in linears)
    net.apply(lambda module: setattr(module, 'seen', True))
    assert all(module.seen for module in net.modules())


@every_family
@torch.no_grad()
def test_whole_models_are_saved(name):
    file = io.BytesIO()
    torch.save(model(name), file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    x = torch.randn(1, 3, 32, 32)
    for mine, theirs in zip(other(x), model(name)(x), strict=True):
        assert torch.equal(mine, theirs)
    metadata = model(name).state_dict()._metadata
    assert other.state_dict()._metadata == metadata
