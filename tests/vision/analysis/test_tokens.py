import pytest
import timm
import torch

from mmvssm.analysis.receptive_field import receptive_field
from mmvssm.analysis.tokens import compute_maps, layer_outputs


@pytest.mark.parametrize('name, extra', [('deit_tiny', 1), ('deit_tiny_distilled', 2)])
def test_a_transformer_of_timm(name, extra):
    """Prefix tokens are taken out; positions go row by row, of any size."""
    torch.manual_seed(0)
    net = timm.create_model(
        f'{name}_patch16_224', depth=2, embed_dim=24, num_heads=3, dynamic_img_size=True
    ).eval()
    images = torch.randn(2, 3, 32, 64)
    sequences = []
    hook = net.blocks[0].register_forward_hook(
        lambda module, inputs, output: sequences.append(output)
    )
    with torch.no_grad():
        found = layer_outputs(net, images)
        last = net.forward_features(images)
        (out,) = compute_maps(net, images)
    hook.remove()
    assert [layer.name for layer in found] == ['0', '1']
    for layer, sequence in ((found[0], sequences[0]), (out, last)):
        assert layer.patches.shape == (2, 24, 2, 4)
        torch.testing.assert_close(layer.tokens, sequence[:, :extra])
        for k in range(8):
            here = layer.patches[:, :, k // 4, k % 4]
            torch.testing.assert_close(here, sequence[:, extra + k])
    assert receptive_field(net, images[:1]).shape == (32, 64)
