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
    # Published dense forms at 224 have no class token, registers or last norm.
    'vim_t': (7_148_008, 6_954_432),
    'vim_s': (25_796_584, None),
    'vim_b': (97_598_440, None),
    'vim_t_stride8': (7_250_344, None),
    'vim_s_stride8': (26_001_256, None),
    'mambar_t': (9_264_232, None),
    'mambar_s': (27_801_064, None),
    'mambar_b': (99_301_096, None),
    'mambar_l': (341_222_376, None),
    'mlla_t': (24_392_200, 23_880_096),
    'mlla_s': (43_015_048, 42_502_944),
    'mlla_b': (95_983_960, 95_216_304),
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
    assert mmvssm.list_models() == sorted(mmvssm.list_models())
    assert mmvssm.list_models('vmamba_t*') == [
        'vmamba_t_s1l8',
        'vmamba_t_s2l5',
        'vmamba_t_v0',
    ]
    assert mmvssm.list_models('nothing*') == []
    studies = {f'linear_attention_study_{arch}' for arch in ('t', 'small')}
    assert set(mmvssm.list_models()) == set(PUBLISHED) | studies


def test_arguments_arrive():
    with torch.device('meta'):
        net = mmvssm.build_classifier(
            'vmamba_t_v0', num_classes=7, in_channels=4, drop_path_rate=0.0
        )
        maps = mmvssm.build_backbone('vmamba_t_v0', out_indices=(1, 2))
    assert net.classifier.head.weight.shape == (7, 768)
    assert net.backbone.patch_embed[0].in_channels == 4
    assert maps.out_channels == (192, 384)


ONE_OF_EACH = ('vmamba_t_v0', 'vim_t', 'mambar_t', 'mlla_t', 'linear_attention_study_t')


@pytest.mark.parametrize('name', ONE_OF_EACH)
@pytest.mark.parametrize('value', [0, -3, 3.0, '3', True, None])
def test_wrong_in_channels(name, value):
    with pytest.raises(ValueError, match='in_channels must be the number of channels'):
        mmvssm.build_backbone(name, in_channels=value)


@pytest.mark.parametrize('name', ONE_OF_EACH)
@pytest.mark.parametrize('value', [0, 224.0, '224', (224,), (224, 224, 3), (224, 0)])
def test_wrong_img_size(name, value):
    with pytest.raises(ValueError, match='img_size must be one number of pixels or'):
        mmvssm.build_backbone(name, img_size=value)


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_only_the_arch_goes_without_a_name(name):
    cls = type(mmvssm.build_backbone(name))
    with pytest.raises(TypeError, match='positional argument'):
        cls('t', 1)


@pytest.mark.parametrize('place', ['none', 'head', 'double'])
def test_other_class_tokens(place):
    with torch.device('meta'):
        net = mmvssm.build_classifier('vim_t', num_classes=7, cls_token=place)
    assert net.backbone.cls_token_place == place
    assert output_shapes(net, (2, 3, 64, 96)) == [(2, 7)]


@pytest.mark.parametrize('registers', [0, 1, 6])
def test_other_registers(registers):
    with torch.device('meta'):
        net = mmvssm.build_classifier('mambar_s', num_classes=7, registers=registers)
    features = 192 * registers or 384
    assert net.classifier.head.weight.shape == (7, features)
    assert output_shapes(net, (2, 3, 64, 96)) == [(2, 7)]


@pytest.mark.parametrize('pooling', ['patches', 'one', 'mean'])
def test_ablations_of_the_register_head(pooling):
    with torch.device('meta'):
        net = mmvssm.build_classifier(
            'mambar_s', num_classes=7, head=dict(pooling=pooling)
        )
    assert net.classifier.pooling == pooling
    assert net.classifier.head.weight.shape == (7, 384)
    assert output_shapes(net, (2, 3, 64, 96)) == [(2, 7)]


def output_shapes(net, image_shape):
    """Run a net of the meta device on shapes alone, forward and backward.

    ``torch.autograd.grad`` refuses a parameter that no output depends on.
    """
    with FakeTensorMode():
        weights = {
            name: torch.empty(p.shape, requires_grad=True)
            for name, p in net.named_parameters()
        }
        buffers = {
            name: torch.empty(b.shape, dtype=b.dtype) for name, b in net.named_buffers()
        }
        image = torch.empty(image_shape)
        outputs = functional_call(net, weights | buffers, (image,))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(sum(x.sum() for x in outputs), list(weights.values()))
    return [tuple(x.shape) for x in outputs]


@pytest.mark.parametrize('name', mmvssm.list_models())
def test_every_backbone(name):
    """Maps of an image that is not square, and no idle parameter.

    At strides 4 to 32 of hierarchical backbones, at one of isotropic ones.
    """
    with torch.device('meta'):
        net = mmvssm.build_backbone(name)
    sizes = [(2, c, 64 // s, 96 // s) for c, s in zip(net.out_channels, (4, 8, 16, 32))]
    if name.startswith(('vim', 'mambar')):
        grid = (7, 11) if name.endswith('stride8') else (4, 6)
        sizes = [(2, c, *grid) for c in net.out_channels]
    assert len(sizes) == 4
    assert output_shapes(net, (2, 3, 64, 96)) == sizes


@pytest.mark.parametrize(
    'name', ['vmamba_t_v0', 'vim_t', 'mambar_t', 'mambar_s', 'mlla_t']
)
def test_every_parameter_of_a_classifier_gets_a_gradient(name):
    with torch.device('meta'):
        net = mmvssm.build_classifier(name, num_classes=7)
    assert output_shapes(net, (2, 3, 64, 96)) == [(2, 7)]


@pytest.mark.parametrize('build', [mmvssm.build_classifier, mmvssm.build_backbone])
def test_unknown_model(build):
    with pytest.raises(ValueError, match='vmamba_t_s1l8'):
        build('vmamba_t_s1l9')
    with pytest.raises(ValueError, match='list_models'):
        build('resnet50')
