"""Images of any number of channels, from the data loader to the model."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

import tiny_det
from tiny import REPO
from tiny_det import needs_detection

MEAN, STD = [10.0, 20.0, 30.0, 40.0], [1.0, 2.0, 4.0, 8.0]


def seg(**options):
    pytest.importorskip('mmseg')
    return MODELS.build(dict(options, type='mmvssm.SegDataPreProcessor'))


def det(**options):
    return MODELS.build(dict(options, type='mmvssm.DetDataPreprocessor'))


both = pytest.mark.parametrize(
    'build', [seg, pytest.param(det, marks=needs_detection)], ids=['seg', 'det']
)


def images(channels, number=2, size=(8, 12), dtype=torch.uint8):
    torch.manual_seed(0)
    return [torch.randint(0, 250, (channels, *size)).to(dtype) for _ in range(number)]


def expected(image, mean, std):
    mean, std = (torch.tensor(x)[:, None, None] for x in (mean, std))
    return (image.float() - mean) / std


@both
@pytest.mark.parametrize('channels', [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    'dtype', [torch.uint8, torch.uint16, torch.int16, torch.float32, torch.float64]
)
def test_any_number_of_channels(build, channels, dtype):
    mean, std = (MEAN * 2)[:channels], (STD * 2)[:channels]
    given = images(channels, dtype=dtype)
    got = build(mean=mean, std=std)(dict(inputs=given, data_samples=None))['inputs']
    assert got.dtype == torch.float32 and got.shape == (2, channels, 8, 12)
    for found, image in zip(got, given, strict=True):
        torch.testing.assert_close(found, expected(image, mean, std))


@both
@pytest.mark.parametrize('mean, std', [([5.0], [2.0]), (5, 2)])
def test_one_number_for_all_channels(build, mean, std):
    (image,) = images(4, 1)
    got = build(mean=mean, std=std)(dict(inputs=[image], data_samples=None))['inputs']
    torch.testing.assert_close(got[0], (image.float() - 5) / 2)


@both
def test_without_numbers_images_stay(build):
    (image,) = images(5, 1)
    got = build()(dict(inputs=[image], data_samples=None))['inputs']
    assert torch.equal(got[0], image.float())


@both
@pytest.mark.parametrize('key', ['bgr_to_rgb', 'rgb_to_bgr'])
def test_colours_are_swapped_of_three_channels_alone(build, key):
    (image,) = images(3, 1)
    net = build(mean=MEAN[:3], std=STD[:3], **{key: True})
    got = net(dict(inputs=[image], data_samples=None))['inputs'][0]
    torch.testing.assert_close(got, expected(image[[2, 1, 0]], MEAN[:3], STD[:3]))
    with pytest.raises(ValueError, match=rf'{key}=True .* mean has 4 numbers: set it'):
        build(mean=MEAN, std=STD, **{key: True})
    for channels in (1, 4):
        # Neither dropped channels, as mmdet does, nor unswapped ones.
        with pytest.raises(ValueError, match=f'an image has {channels}: set it to Fa'):
            build(**{key: True})(dict(inputs=images(channels), data_samples=None))


@both
@pytest.mark.parametrize('channels', [1, 3, 5])
@pytest.mark.parametrize('stacked', [False, True])
def test_images_of_another_number_of_channels(build, channels, stacked):
    inputs = images(channels)
    inputs = torch.stack(inputs) if stacked else inputs
    with pytest.raises(ValueError) as error:
        build(mean=MEAN, std=STD)(dict(inputs=inputs, data_samples=None))
    (said,) = str(error.value).splitlines()
    assert said.startswith(f'an image has {channels} channels, but mean and std of')


@both
@pytest.mark.parametrize(
    'options, said',
    [
        (dict(mean=MEAN, std=STD[:3]), 'equally many numbers'),
        (dict(mean=MEAN), 'equally many numbers'),
        (dict(std=STD), 'equally many numbers'),
        (dict(mean=[], std=[]), 'a number for each channel'),
        (dict(mean=['a'], std=[1]), r"a number for each channel .* got \['a'\]"),
    ],
)
def test_means_that_are_none(build, options, said):
    with pytest.raises(ValueError, match=said):
        build(**options)


def sample(size=(8, 12)):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    found = SegDataSample(metainfo=dict(img_shape=size))
    found.gt_sem_seg = PixelData(data=torch.zeros(1, *size, dtype=torch.uint8))
    return found


@pytest.mark.parametrize('training', [True, False])
def test_is_mmsegs_preprocessor_in_all_else(training):
    pytest.importorskip('mmseg')
    from mmseg.models import SegDataPreProcessor

    options = dict(
        mean=MEAN[:3],
        std=STD[:3],
        bgr_to_rgb=True,
        pad_val=7,
        seg_pad_val=255,
        size=(16, 16),
        test_cfg=dict(size_divisor=16),
    )
    ours = seg(**options)
    assert isinstance(ours, SegDataPreProcessor)
    assert not ours.state_dict(), 'no checkpoint has them'
    data = dict(inputs=images(3), data_samples=[sample(), sample()])
    got, want = (
        net(copy.deepcopy(data), training)
        for net in (copy.deepcopy(ours), SegDataPreProcessor(**options))
    )
    assert torch.equal(got['inputs'], want['inputs'])
    for a, b in zip(got['data_samples'], want['data_samples'], strict=True):
        assert a.metainfo == b.metainfo


def test_four_bands_are_padded():
    net = seg(mean=MEAN, std=STD, pad_val=7, size=(16, 16))
    data = dict(inputs=images(4), data_samples=[sample(), sample()])
    got = net(data, True)
    assert got['inputs'].shape == (2, 4, 16, 16)
    assert (got['inputs'][:, :, 8:] == 7).all()
    assert (got['data_samples'][0].gt_sem_seg.data[:, 8:] == 255).all()


@needs_detection
@pytest.mark.parametrize('masked', [False, True])
def test_detector_of_four_bands(masked):
    cfg = tiny_det.shrink(Config.fromfile(REPO / 'configs/mask_rcnn_vmamba_t_1x.py'))
    cfg.model.backbone.update(in_channels=4, mask_padding=masked)
    cfg.model.data_preprocessor.update(
        type='mmvssm.DetDataPreprocessor', mean=MEAN, std=STD, bgr_to_rgb=False
    )
    model = tiny_det.build(cfg)
    data = tiny_det.batch()
    data['inputs'] = [torch.cat([x, x[:1]]) for x in data['inputs']]
    loss = tiny_det.total_loss(
        model(**model.data_preprocessor(copy.deepcopy(data), True), mode='loss')
    )
    loss.backward()
    assert loss.isfinite()
    with torch.no_grad():
        assert len(model.eval().test_step(data)) == len(data['inputs'])
