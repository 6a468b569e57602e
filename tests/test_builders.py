import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

import mmvssm

# Model -> parameters of the classifier and of the backbone with four norms.
PUBLISHED = {
    'vmamba_t_v0': (22_893_448, 22_125_792),
    'vmamba_s_v0': (44_417_416, None),
    'vmamba_b_v0': (76_254_056, None),
    'vmamba_t_s2l5': (30_705_832, None),
    'vmamba_s_s2l15': (50_147_752, 49_380_096),
    'vmamba_b_s2l15': (88_557_800, 87_534_592),
    'vmamba_t_s1l8': (30_249_064, 29_481_408),
    'vmamba_s_s1l20': (49_012_840, None),
    'vmamba_b_s1l20': (86_614_504, None),
}


def count(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_parameter_counts(name):
    classifier, backbone = PUBLISHED[name]
    with torch.device('meta'):
        assert count(mmvssm.build_classifier(name)) == classifier
        if backbone is not None:
            assert count(mmvssm.build_backbone(name)) == backbone


def test_list_models():
    assert set(PUBLISHED) <= set(mmvssm.list_models())
    assert mmvssm.list_models() == sorted(mmvssm.list_models())
    assert mmvssm.list_models('vmamba_t*') == [
        'vmamba_t_s1l8',
        'vmamba_t_s2l5',
        'vmamba_t_v0',
    ]
    assert mmvssm.list_models('nothing*') == []


def test_arguments_arrive():
    with torch.device('meta'):
        net = mmvssm.build_classifier(
            'vmamba_t_v0', num_classes=7, in_channels=4, drop_path_rate=0.0
        )
        maps = mmvssm.build_backbone('vmamba_t_v0', out_indices=(1, 2))
    assert net.classifier.head.weight.shape == (7, 768)
    assert net.backbone.patch_embed[0].in_channels == 4
    assert maps.out_channels == (192, 384)


def output_shapes(net, image_shape):
    """Run a net of the meta device on shapes alone, forward and backward.

    ``torch.autograd.grad`` refuses a parameter that no output depends on.
    """
    with FakeTensorMode():
        weights = {
            name: torch.empty(p.shape, requires_grad=True)
            for name, p in net.named_parameters()
        }
        outputs = functional_call(net, weights, (torch.empty(image_shape),))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(sum(x.sum() for x in outputs), list(weights.values()))
    return [tuple(x.shape) for x in outputs]


@pytest.mark.parametrize('name', mmvssm.list_models())
def test_every_backbone(name):
    """Maps at strides 4 to 32 of an image that is not square; no idle parameter."""
    with torch.device('meta'):
        net = mmvssm.build_backbone(name)
    sizes = [(2, c, 64 // s, 96 // s) for c, s in zip(net.out_channels, (4, 8, 16, 32))]
    assert output_shapes(net, (2, 3, 64, 96)) == sizes


def test_every_parameter_of_a_classifier_gets_a_gradient():
    with torch.device('meta'):
        net = mmvssm.build_classifier('vmamba_t_v0', num_classes=7)
    assert output_shapes(net, (2, 3, 64, 96)) == [(2, 7)]


@pytest.mark.parametrize('build', [mmvssm.build_classifier, mmvssm.build_backbone])
def test_unknown_model(build):
    with pytest.raises(ValueError, match='vmamba_t_s1l8'):
        build('vmamba_t_s1l9')
    with pytest.raises(ValueError, match='list_models'):
        build('resnet50')
