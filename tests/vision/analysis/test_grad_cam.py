"""The package grad-cam explains our models by the layer and reshape that we name."""

import numpy as np
import pytest
import torch

from families import FAMILIES
from mmvssm.analysis.cam import grad_cam, target_layer_and_reshape
from mmvssm.heads import ClassificationHead, ClassTokenHead, ImageClassifier

package = pytest.importorskip('pytorch_grad_cam')


def explain(net, image, target, score):
    """Maps of the package and of ours, both as the package scales them."""
    from pytorch_grad_cam.utils.image import scale_cam_image

    layer, reshape = target_layer_and_reshape(net)
    ours = grad_cam(layer, reshape, lambda: score(net(image)[0])).numpy()
    size = image.shape[3], image.shape[2]
    ours = scale_cam_image(scale_cam_image(ours[None], size))[0]
    with package.GradCAM(
        model=net, target_layers=[layer], reshape_transform=reshape
    ) as cam:
        theirs = cam(input_tensor=image, targets=[target])[0]
    return theirs, ours


@pytest.mark.parametrize('name', FAMILIES)
def test_classifiers(name):
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    torch.manual_seed(0)
    isotropic = name in ('vim', 'mambar')
    net = FAMILIES[name](**dict(classification=True) if isotropic else {})
    head = ClassTokenHead(16, 5) if isotropic else ClassificationHead(32, 5)
    model = ImageClassifier(net, head).eval()
    image = torch.randn(1, 3, 32, 48)
    target = int(model(image)[0].argmax())
    theirs, ours = explain(
        model, image, ClassifierOutputTarget(target), lambda logits: logits[target]
    )
    assert theirs.shape == (32, 48) and theirs.max() > 0.99
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


def test_segmentor():
    from mmseg.models import EncoderDecoder
    from pytorch_grad_cam.utils.model_targets import SemanticSegmentationTarget

    torch.manual_seed(0)
    model = EncoderDecoder(
        backbone=dict(
            type='mmvssm.VSSM', arch=dict(depths=(1, 1), dims=8), out_indices=(0, 1)
        ),
        decode_head=dict(
            type='mmseg.FCNHead', in_channels=16, in_index=1, channels=8, num_classes=4
        ),
        test_cfg=dict(mode='whole'),
    ).eval()
    image = torch.randn(1, 3, 32, 48)
    logits = model(image)[0]
    target = int(logits.argmax(0).flatten().mode().values)
    mask = (logits.argmax(0) == target).float().numpy()
    theirs, ours = explain(
        model,
        image,
        SemanticSegmentationTarget(target, mask),
        lambda logits: (logits[target] * torch.from_numpy(mask)).sum(),
    )
    assert theirs.max() > 0.99
    np.testing.assert_allclose(theirs, ours, atol=1e-5)
