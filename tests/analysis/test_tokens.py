import pytest
import torch

from families import FAMILIES
from mmvssm.analysis.tokens import compute_maps, layer_outputs, tokens_inside


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def build(name):
    torch.manual_seed(0)
    return FAMILIES[name]().eval()


@pytest.mark.parametrize('name', ['vmamba_v0', 'vmamba_v05_noz', 'mlla'])
def test_hierarchical(name, images):
    backbone = build(name)
    with torch.no_grad():
        found = layer_outputs(backbone, images)
        assert [layer.name for layer in found] == ['0.0', '1.0']
        x = backbone.patch_embed(images)
        for layer, stage in zip(found, backbone.layers):
            out = stage.blocks[0](x)
            x = stage.downsample(out)
            torch.testing.assert_close(layer.patches, out)
            assert layer.tokens.shape == (2, 0, out.shape[1])


@pytest.mark.parametrize('name, extra', [('vim', 1), ('mambar', 3)])
def test_isotropic(name, extra, images):
    """The stream with the block's own part, patches and tokens picked one by one."""
    backbone = build(name)
    with torch.no_grad():
        found = layer_outputs(backbone, images)
        assert [layer.name for layer in found] == ['0', '1']
        sequence = []
        hook = backbone.layers[0].register_forward_hook(
            lambda module, inputs, output: sequence.append(output[0] + output[1])
        )
        backbone.compute_maps(images)
        hook.remove()
    places = backbone.token_positions(8 * 12)
    assert len(places) == extra
    patches = [i for i in range(8 * 12 + extra) if i not in places]
    for k, i in enumerate(patches):
        here = found[0].patches[:, :, k // 12, k % 12]
        torch.testing.assert_close(here, sequence[0][:, i])
    torch.testing.assert_close(found[0].tokens, sequence[0][:, list(places)])


@pytest.mark.parametrize('name', FAMILIES)
def test_maps_are_those_of_the_backbone(name, images):
    backbone = build(name)
    with torch.no_grad():
        outs, found = backbone(images), compute_maps(backbone, images)
    assert len(outs) == len(found)
    for out, layer in zip(outs, found):
        torch.testing.assert_close(layer.patches, out, rtol=0, atol=0)
    assert not getattr(backbone, 'return_tokens', False)


def test_tokens_are_there_without_return_tokens(images):
    found = compute_maps(build('mambar'), images)[-1]
    assert found.tokens.shape == (2, 3, 16)


@pytest.mark.parametrize('out_type', ['cls_token', 'avg_featmap', 'featmap'])
def test_maps_whatever_the_out_type(out_type, images):
    torch.manual_seed(0)
    backbone = FAMILIES['vim'](out_type=out_type).eval()
    found = compute_maps(backbone, images)[-1]
    assert (found.patches.shape, found.tokens.shape) == ((2, 16, 8, 12), (2, 1, 16))
    assert backbone.out_type == out_type
    assert not backbone.return_tokens


def test_hooks_are_gone_after_an_error(images):
    backbone = build('vim')
    with pytest.raises(ZeroDivisionError):
        layer_outputs(backbone, images, lambda layer: 1 / 0)
    assert not any(block._forward_hooks for block in backbone.layers)


def test_unknown_backbone(images):
    with pytest.raises(ValueError, match='the blocks of Conv2d are not known'):
        layer_outputs(torch.nn.Conv2d(3, 4, 3), images)


def test_tokens_inside():
    mask = torch.zeros(8, 12, dtype=torch.bool)
    mask[:4, :6] = True  # One of 2 x 2 parts.
    mask[4:6, 6:] = True  # Half of another one.
    mask[6, 0] = True
    assert tokens_inside(mask, (2, 2)).tolist() == [[True, False], [False, True]]
