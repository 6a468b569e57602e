"""What is exported of a model: its inputs, outputs, padding and normalisation."""

import pytest
import torch

from export.models import classifier, segmentor
from mmvssm.export import ExportError
from mmvssm.export.verify import prepare
from mmvssm.export.wrappers import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Normalisation,
    normalisation_of,
    wrap,
)

pytest.importorskip('mmseg')


def pixels(*size, channels=3):
    return torch.randint(0, 256, (channels, *size), dtype=torch.uint8)


def of_mmseg(model, image):
    """Labels of mmseg, of an image as OpenCV reads it."""
    from mmseg.structures import SegDataSample

    size = tuple(image.shape[1:])
    sample = SegDataSample(metainfo=dict(ori_shape=size, img_shape=size))
    with torch.no_grad():
        (found,) = model.test_step(dict(inputs=[image], data_samples=[sample]))
    return found.pred_sem_seg.data


@pytest.mark.parametrize(
    'test_cfg', [None, dict(size_divisor=32), dict(size=(64, 96))], ids=str
)
@pytest.mark.parametrize('size', [(64, 96), (50, 33), (70, 101)])
def test_labels_are_those_of_mmseg_padded_or_not(test_cfg, size):
    model = segmentor('vmamba', **{'model.data_preprocessor.test_cfg': test_cfg})
    image = pixels(*size)
    with torch.no_grad():
        (labels,) = wrap(model, normalise=True)(image.flip(0)[None].float())
    torch.testing.assert_close(labels, of_mmseg(model, image), rtol=0, atol=0)


def test_one_logit_has_a_threshold():
    model = segmentor(
        'vmamba',
        **{
            'model.decode_head.num_classes': 2,
            'model.decode_head.out_channels': 1,
            'model.decode_head.threshold': 0.4,
            'model.decode_head.loss_decode.use_sigmoid': True,
        },
    )
    image = pixels(48, 40)
    with torch.no_grad():
        (labels,) = wrap(model, normalise=True)(image.flip(0)[None].float())
    assert labels.dtype == torch.int64
    assert (labels == of_mmseg(model, image)).all()


@pytest.mark.parametrize('swap', [True, False])
def test_the_graph_normalises_as_the_data_preprocessor(swap):
    model = segmentor('vmamba', **{'model.data_preprocessor.bgr_to_rgb': swap})
    image = pixels(32, 40)
    prepared = model.data_preprocessor(dict(inputs=[image]))['inputs']
    rgb = image.flip(0)[None].float()
    inside, outside = (wrap(model, 'logits', normalise=n) for n in (True, False))
    with torch.no_grad():
        torch.testing.assert_close(inside(rgb), outside(prepared), rtol=0, atol=0)
    before = torch.from_numpy(prepare(outside, rgb.numpy()))
    torch.testing.assert_close(before, prepared, rtol=1e-6, atol=1e-6)


def test_classifiers_want_the_mean_of_imagenet():
    found = normalisation_of(classifier('vim'))
    assert found == Normalisation(IMAGENET_MEAN, IMAGENET_STD, bgr=False)


def test_maps_of_a_segmentor_are_those_of_its_backbone():
    model = segmentor('vmamba')
    module = wrap(model, 'maps')
    assert module.output_names == ('map0', 'map1', 'map2', 'map3')
    image = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        torch.testing.assert_close(module(image), model.backbone(image))


def test_a_segmentor_of_another_kind_is_refused():
    from mmseg.models import BaseSegmentor

    class Own(BaseSegmentor):
        def extract_feat(self, inputs):
            pass

        encode_decode = loss = predict = _forward = extract_feat

    with pytest.raises(ExportError, match='export its backbone alone'):
        wrap(Own().eval())
