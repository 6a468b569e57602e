"""Our models in segmentation-models-pytorch and torchvision, and the page about it."""

import re

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

from mmvssm.necks import PlainPyramid
from tiny import REPO

PAGE = (REPO / 'docs' / 'timm.md').read_text()
DECODERS = (
    *('Unet', 'UnetPlusPlus', 'MAnet', 'Linknet', 'FPN', 'UPerNet', 'Segformer'),
    *('PSPNet', 'DPT', 'PAN', 'DeepLabV3', 'DeepLabV3Plus'),
)


def example(section):
    """What the code of a section of the page defines."""
    body = PAGE.partition(f'\n## {section}\n')[2].partition('\n## ')[0]
    (code,) = re.findall(r'```python\n(.*?)```', body, re.S)
    found = dict(__name__='example')
    exec(compile(code, f'docs/timm.md: {section}', 'exec'), found)
    return found


def test_timm_example():
    found = example('timm')
    assert found['logits'].shape == (2, 10)
    assert found['maps'].feature_info.reduction() == [8, 16, 32]


def test_every_decoder_is_on_the_page():
    rows = ''.join(re.findall(r'^\| `.*', PAGE.partition('| Decoder |')[2], re.M))
    named = set(re.findall(r'`([A-Z]\w+)`', rows.partition('\n## ')[0]))
    there = {
        name
        for name, thing in vars(smp).items()
        if isinstance(thing, type) and issubclass(thing, smp.base.SegmentationModel)
    }
    assert named == there == set(DECODERS)


def build(decoder, encoder, **options):
    return getattr(smp, decoder)(
        encoder, encoder_weights=None, in_channels=4, classes=3, **options
    )


@pytest.mark.parametrize(
    ('encoder', 'decoder'),
    [('tu-mlla_t', decoder) for decoder in DECODERS]
    + [('tu-vim_t', decoder) for decoder in ('UPerNet', 'DPT', 'PSPNet', 'DeepLabV3')],
)
def test_decoder(encoder, decoder):
    if decoder.startswith('DeepLab'):
        with pytest.raises(ValueError, match='cannot be dilated: leave output_stride'):
            build(decoder, encoder)
        return
    options, side = {}, 64
    if decoder == 'PAN':
        options, side = dict(encoder_output_stride=32), 256
    elif encoder == 'tu-mlla_t':
        more = dict(PSPNet=dict(out_norm=False), DPT=dict(decoder_readout='ignore'))
        options = more.get(decoder, {})
    net = build(decoder, encoder, **options)
    logits = net(torch.randn(2, 4, side, side))
    assert logits.shape == (2, 3, side, side)
    logits.square().mean().backward()
    left = [name for name, p in net.named_parameters() if p.grad is None]
    if decoder == 'DPT':
        assert all('.classifier.' in name or '.norm_f.' in name for name in left)
    elif decoder == 'PSPNet' and encoder == 'tu-vim_t':
        assert left and all('.neck.' in name for name in left)
    else:
        assert not left
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_upernet_trains():
    """The example of the page learns two images by heart."""
    torch.manual_seed(0)
    net = example('segmentation-models-pytorch')['net']
    assert isinstance(net, smp.UPerNet)
    for module in net.modules():
        if hasattr(module, 'drop_prob'):
            module.drop_prob = 0.0
    x = torch.randn(2, 4, 64, 64)
    y = torch.randint(3, (2, 8, 8)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4)
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


# torchvision


def detector(backbone):
    """A Mask R-CNN with few proposals and small images, to be quick."""
    few = dict(
        rpn_pre_nms_top_n_train=50,
        rpn_post_nms_top_n_train=16,
        rpn_pre_nms_top_n_test=20,
        rpn_post_nms_top_n_test=8,
        box_batch_size_per_image=16,
    )
    kind = example('torchvision')['MaskRCNN']
    return kind(backbone, num_classes=3, min_size=64, max_size=96, **few)


def batch():
    images, targets = [torch.rand(3, 60, 80), torch.rand(3, 72, 64)], []
    for label, image in enumerate(images, 1):
        image[:, 10:50, 12:52] = label / 2
        mask = torch.zeros(1, *image.shape[1:], dtype=torch.uint8)
        mask[0, 10:50, 12:52] = 1
        boxes = torch.tensor([[12.0, 10, 52, 50]])
        targets.append(dict(boxes=boxes, labels=torch.tensor([label]), masks=mask))
    return images, targets


def test_mask_rcnn_trains():
    torch.manual_seed(0)
    found = example('torchvision')
    assert type(found['net'].backbone).__name__ == 'Pyramid'
    backbone = found['Pyramid']('mlla_t', out_channels=32, drop_path_rate=0.0)
    net = detector(backbone)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4)
    images, targets = batch()
    totals = []
    for _ in range(5):
        losses = net(images, targets)
        assert losses.keys() >= {'loss_mask', 'loss_box_reg', 'loss_objectness'}
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.7 * totals[0], totals
    with torch.no_grad():
        outs = net.eval()(images)
    for image, out in zip(images, outs, strict=True):
        assert out['masks'].shape[1:] == (1, *image.shape[1:])
        assert out.keys() >= {'boxes', 'labels', 'scores'}


def test_mask_rcnn_with_an_isotropic_backbone():
    """As the page says: a PlainPyramid between body and FPN."""
    pyramid = example('torchvision')['Pyramid']('vim_t', out_channels=32)
    pyramid.body = nn.Sequential(pyramid.body, PlainPyramid(192))
    losses = detector(pyramid)(*batch())
    assert all(loss.isfinite() for loss in losses.values())
