import pytest
import torch

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


def test_every_parameter_of_a_classifier_gets_a_gradient():
    net = mmvssm.build_classifier('vmamba_t_v0', num_classes=3)
    net(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize('build', [mmvssm.build_classifier, mmvssm.build_backbone])
def test_unknown_model(build):
    with pytest.raises(ValueError, match='vmamba_t_s1l8'):
        build('vmamba_t_s1l9')
    with pytest.raises(ValueError, match='list_models'):
        build('resnet50')
