"""Every model of mmseg's ``_base_/models`` that takes our backbones, with each."""

from pathlib import Path

import pytest
import torch

import mmvssm  # noqa: F401  registers the backbones
from mmvssm.engine.model_check.samples import segmentation_sample
from tiny_det import NO_DETECTION

from .swap import (
    FAMILIES,
    HIERARCHICAL,
    ISOTROPIC,
    Host,
    build,
    case_name,
    cases,
    complaints,
    without_gradient,
)

# The maps have odd sizes.
SIZE = (65, 99)

# Their heads read four maps, of a neck that keeps the channels or of the backbone.
FOUR_MAPS = dict(
    fit=lambda c: {'decode_head.in_channels': c, 'auxiliary_head.in_channels': c[2]}
)
HOSTS = [
    Host('ann_r50-d8'),
    Host('apcnet_r50-d8'),
    Host(
        'bisenetv1_r18-d32',
        fits=HIERARCHICAL,
        nested=True,
        maps=(0, 1, 2, 3),
        unread=True,
        # Its other branch rounds sizes up, and some stems of ours down.
        size=(64, 96),
        fit=lambda c: {
            'backbone.context_channels': c[1:],
            'backbone.spatial_channels': (8, 8, 8, c[1]),
            'auxiliary_head.0.in_channels': c[1],
            'auxiliary_head.1.in_channels': c[1],
        },
    ),
    Host('bisenetv2', fits=()),
    Host('ccnet_r50-d8'),
    Host('cgnet', fits=()),
    Host('danet_r50-d8'),
    Host('deeplabv3_r50-d8'),
    Host('deeplabv3_unet_s5-d16', fits=()),
    Host('deeplabv3plus_r50-d8'),
    Host('dmnet_r50-d8'),
    Host('dnl_r50-d8'),
    Host(
        'dpt_vit-b16',
        fits=ISOTROPIC,
        changes={'decode_head.readout_type': 'ignore'},
        fit=lambda c: {'backbone.return_tokens': True, 'decode_head.embed_dims': c[0]},
    ),
    Host('emanet_r50-d8'),
    # Without add_lateral the head reads the last map alone.
    Host('encnet_r50-d8', changes={'decode_head.in_index': (2, 3)}),
    Host('erfnet_fcn', fits=()),
    Host('fast_scnn', fits=()),
    # The neck passes a map of the backbone on.
    Host('fastfcn_r50-d32_jpu_psp', fit=lambda c: {'auxiliary_head.in_channels': c[1]}),
    Host('fcn_hr18'),
    Host('fcn_r50-d8'),
    Host('fcn_unet_s5-d16', fits=()),
    Host('fpn_poolformer_s12'),
    Host('fpn_r50'),
    Host('gcnet_r50-d8'),
    Host('icnet_r50-d8', fits=(), nested=True, maps=(0, 1, 2, 3)),
    Host('isanet_r50-d8'),
    Host('lraspp_m-v3-d8', fits=()),
    Host('nonlocal_r50-d8'),
    Host('ocrnet_hr18'),
    # The second head needs a map of the size that the first one has.
    Host('ocrnet_r50-d8', changes={'decode_head.0.in_index': 3}),
    Host('pointrend_r50', detection=True, tiny={'train_cfg.num_points': 32}),
    Host('psanet_r50-d8', detection=True, tiny={'decode_head.mask_size': (9, 9)}),
    Host('pspnet_r50-d8'),
    Host('pspnet_unet_s5-d16', fits=()),
    Host('san_vit-b16', fits=()),
    Host('segformer_mit-b0'),
    Host('segmenter_vit-b16_mask'),
    Host('setr_mla', fits=ISOTROPIC),
    Host('setr_naive'),
    Host('setr_pup'),
    Host(
        'stdc',
        nested=True,
        maps=(1, 2, 3),
        fit=lambda c: {
            'backbone.last_in_channels': c[:0:-1],
            'backbone.ffm_cfg.in_channels': c[0] + 16,
            'auxiliary_head.2.in_channels': c[0],
        },
    ),
    Host('twins_pcpvt-s_fpn'),
    Host('twins_pcpvt-s_upernet'),
    Host('upernet_beit', **FOUR_MAPS),
    Host('upernet_convnext'),
    Host('upernet_mae', **FOUR_MAPS),
    Host('upernet_r50'),
    Host('upernet_swin'),
    Host('upernet_vit-b16_ln_mln'),
    Host('vpd_sd', fits=()),
]
# Heads without a file there.
MORE_HOSTS = [
    Host('knet/knet-s3_r50-d8_fcn_8xb2-adamw-80k_ade20k-512x512'),
    Host('knet/knet-s3_r50-d8_upernet_8xb2-adamw-80k_ade20k-512x512'),
    Host('maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512', detection=True),
    Host('mask2former/mask2former_r50_8xb2-160k_ade20k-512x512', detection=True),
    Host('segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512'),
]


def folder():
    mmseg = pytest.importorskip('mmseg')
    return Path(mmseg.__file__).parent / '.mim' / 'configs'


def batch(number, size=SIZE):
    """Random images and labels."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1, 1))
    images = torch.randint(0, 256, (number, 3, *size), dtype=torch.uint8)
    labels = torch.randint(0, 2, (number, 1, *size))
    return dict(
        inputs=list(images),
        data_samples=[
            SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=x)) for x in labels
        ],
    )


def built(host, family):
    if host.detection and NO_DETECTION:
        pytest.skip(NO_DETECTION)
    file = host.file if '/' in host.file else f'_base_/models/{host.file}'
    path = folder() / f'{file}.py'
    return build(path, 'mmseg', host, family, size=host.size or SIZE)


def train(model, size):
    losses = model(**model.data_preprocessor(batch(2, size), True), mode='loss')
    loss, _ = model.parse_losses(losses)
    loss.backward()
    return loss


@pytest.mark.parametrize('host, family', cases(HOSTS + MORE_HOSTS), ids=case_name)
def test_trained_and_tested(host, family):
    size = host.size or SIZE
    model = built(host, family)
    loss = train(model, size)
    assert loss.isfinite()
    assert not without_gradient(model)
    with torch.no_grad():
        (sample,) = model.eval().test_step(batch(1, size))
    labels = sample.pred_sem_seg.data
    assert labels.shape == (1, *size)
    assert 0 <= labels.min() and labels.max() < model.num_classes
    assert sample.seg_logits.data.isfinite().all()


@pytest.mark.parametrize(
    'host', [x for x in HOSTS + MORE_HOSTS if 'VSSM' in x.fits], ids=case_name
)
def test_nothing_to_complain_of(host):
    assert not complaints(built(host, 'VSSM'), segmentation_sample(host.size or SIZE))


@pytest.mark.parametrize(
    'host, family',
    [
        pytest.param(host, family)
        for host in HOSTS
        # All others are a backbone, and its heads.
        if host.fits or host.file in ('icnet_r50-d8', 'lraspp_m-v3-d8')
        for family in FAMILIES
        if family not in host.fits
    ],
    ids=case_name,
)
def test_what_does_not_fit(host, family):
    with pytest.raises((AssertionError, AttributeError, RuntimeError, TypeError)):
        train(built(host, family), host.size or SIZE)


def test_every_model_is_named():
    found = {path.stem for path in (folder() / '_base_' / 'models').glob('*.py')}
    assert found <= {host.file for host in HOSTS}
