"""Our heads in MMPretrain's ``ImageClassifier``."""

import pytest
import torch
from mmpretrain.models.heads import ClsHead
from mmpretrain.structures import DataSample
from mmseg.registry import MODELS as SEG_MODELS

import mmvssm
from mmvssm.families import families
from mmvssm.heads import ImageClassifier, RegisterHead
from tiny_cls import PARTS, build

FAMILIES = tuple(PARTS)
IMAGES = (2, 3, 32, 32)
SMOOTH = dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')


def own_classifier(net):
    """The same architecture, built as plain PyTorch by the record of the family."""
    family = next(f for f in families() if isinstance(net.backbone, f.backbone))
    head = net.head.classifier
    backbone = net.backbone
    options = {}
    if isinstance(head, RegisterHead):
        options = dict(reduce=2)
    arch = next(iter(family.archs))
    other = family.head(backbone, arch, net.head.num_classes, **options)
    return ImageClassifier(backbone, other)


def samples(*labels):
    return [DataSample().set_gt_label(label) for label in labels]


@pytest.mark.parametrize('family', FAMILIES)
def test_it_is_a_head_of_mmpretrain(family):
    net = build(family, loss=SMOOTH, topk=(1, 2), cal_acc=True)
    assert isinstance(net.head, ClsHead)
    images = torch.randn(IMAGES)
    losses = net(images, samples(0, 2), mode='loss')
    assert set(losses) == {'loss', 'accuracy_top-1', 'accuracy_top-2'}
    # By hand: (1 - e) y + e / K, as the published recipes smooth.
    target = torch.full((2, 3), 0.1 / 3)
    target[0, 0] += 0.9
    target[1, 2] += 0.9
    logits = net(images)
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(losses['loss'], expected)
    losses['loss'].backward()
    unused = [n for n, p in net.named_parameters() if p.grad is None]
    assert not unused

    net.eval()
    found = net(images, mode='predict')
    scores = torch.stack([sample.pred_score for sample in found])
    torch.testing.assert_close(scores, net(images).softmax(1))
    features = net.extract_feat(images, stage='pre_logits')
    torch.testing.assert_close(net.head.classifier.head(features), net(images))


@pytest.mark.parametrize('family', FAMILIES)
def test_checkpoints_go_both_ways_without_conversion(family, tmp_path):
    trained, other = build(family).eval(), build(family).eval()
    plain = own_classifier(other).eval()
    images = torch.randn(IMAGES)
    file = tmp_path / 'classifier.pth'
    torch.save(dict(state_dict=trained.state_dict()), file)
    report = mmvssm.load_checkpoint(plain, file, strict=True)
    assert report.contents == 'classifier' and not report.missing
    torch.testing.assert_close(plain(images), trained(images), rtol=0, atol=0)

    # The names of a published file: those of a bare classifier.
    published = {
        name.removeprefix('backbone.'): value
        for name, value in plain.state_dict().items()
    }
    torch.save(dict(model=published), file)
    again = build(family).eval()
    report = mmvssm.load_checkpoint(again, file, strict=True)
    assert not report.missing and not report.unexpected
    torch.testing.assert_close(again(images), trained(images), rtol=0, atol=0)


def test_another_number_of_classes_leaves_the_last_layer():
    net = build(num_classes=5)
    before = net.head.classifier.head.weight.clone()
    source = build(num_classes=3)
    report = mmvssm.load_checkpoint(net, source.state_dict())
    assert report.missing == [
        'head.classifier.head.weight',
        'head.classifier.head.bias',
    ]
    torch.testing.assert_close(net.head.classifier.head.weight, before)


def test_a_segmentor_starts_from_it(tmp_path):
    source = build()
    file = tmp_path / 'classifier.pth'
    torch.save(dict(state_dict=source.state_dict()), file)
    backbone = dict(PARTS['vmamba'][0], out_indices=(0, 1), out_norm=True)
    init = dict(type='Pretrained', checkpoint=str(file))
    net = SEG_MODELS.build(dict(backbone, init_cfg=init))
    net.init_weights()
    name = 'layers.1.blocks.0.op.x_proj_weight'
    torch.testing.assert_close(
        net.state_dict()[name], source.backbone.state_dict()[name], rtol=0, atol=0
    )


@pytest.mark.parametrize(
    'family, option, words',
    [
        ('vim', dict(classification=False), 'classification=True'),
        ('mambar', dict(classification=False), 'classification=True'),
    ],
)
def test_a_backbone_of_another_form_is_refused(family, option, words):
    net = build(family)
    net.backbone = type(net.backbone)(
        dict(PARTS[family][0]['arch']), img_size=32, **option
    )
    with pytest.raises(ValueError, match=words):
        net(torch.randn(IMAGES))


def test_the_last_of_several_maps_is_taken():
    net = build('vmamba').eval()
    images = torch.randn(IMAGES)
    expected = net(images)
    net.backbone = type(net.backbone)(
        dict(PARTS['vmamba'][0]['arch']), out_indices=(0, 1), out_norm=False
    ).eval()
    source = build('vmamba')
    net.load_state_dict(source.state_dict())
    torch.testing.assert_close(net(images), source.eval()(images), rtol=0, atol=0)
    assert not torch.allclose(net(images), expected)
    stages = [net.extract_feat(images, stage=x) for x in ('backbone', 'pre_logits')]
    last = net.head.classifier.pre_logits(stages[0][1])
    torch.testing.assert_close(stages[1], last, rtol=0, atol=0)


def test_a_pooled_head_refuses_tokens():
    net = build('vmamba')
    net.backbone = build('vim').backbone
    with pytest.raises(ValueError, match='PooledClsHead takes maps'):
        net(torch.randn(IMAGES))
