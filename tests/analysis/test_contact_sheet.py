"""The contact sheet: what it draws, and what it refuses."""

import numpy as np
import pytest
from PIL import Image

from mmvssm.analysis.contact_sheet import write_contact_sheet, write_model_contact_sheet
from tiny import REPO

CLASSES = ('ground', 'tree')
PALETTE = ([10, 200, 30], [220, 40, 50])


def samples(count, height=40, width=60):
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (count, height, width, 3), np.uint8))
    truths = list(np.zeros((count, height, width), dtype=np.uint8))
    return images, truths, [truth + 1 for truth in truths]


def share(picture, colour):
    return (picture == colour).all(-1).mean()


def test_truth_and_prediction_have_their_colours(tmp_path):
    path = write_contact_sheet(
        tmp_path / 'deep' / 'sheet.png', *samples(3), CLASSES, PALETTE
    )
    picture = np.asarray(Image.open(path).convert('RGB'))
    assert Image.open(path).format == 'PNG'
    for colour in PALETTE:
        assert share(picture, colour) > 0.08
    # Truth left of prediction.
    columns = [np.argwhere((picture == colour).all(-1))[:, 1] for colour in PALETTE]
    assert np.median(columns[0]) < np.median(columns[1])


def test_of_many_samples_evenly_spaced_rows_are_drawn(tmp_path):
    images, truths, predictions = samples(9)
    for shown in (0, 4, 8):
        truths[shown] = np.ones_like(truths[shown])
    few = write_contact_sheet(
        tmp_path / 'few.png', images, truths, predictions, CLASSES, PALETTE, max_rows=3
    )
    all_rows = write_contact_sheet(
        tmp_path / 'all.png', images, truths, predictions, CLASSES, PALETTE
    )
    assert Image.open(few).height < Image.open(all_rows).height
    picture = np.asarray(Image.open(few).convert('RGB'))
    assert share(picture, PALETTE[0]) < 0.02, 'only in the legend'


def test_ignored_pixels_and_odd_shapes(tmp_path):
    images, truths, predictions = samples(2, 30, 80)
    truths[0][:] = 255
    path = write_contact_sheet(
        tmp_path / 'sheet.png', images, truths, predictions, CLASSES, PALETTE
    )
    assert path.stat().st_size > 0


def test_bad_samples(tmp_path):
    images, truths, predictions = samples(2)

    def write(
        images=images, truths=truths, predictions=predictions, palette=PALETTE, **more
    ):
        write_contact_sheet(
            tmp_path / 'sheet.png',
            images,
            truths,
            predictions,
            CLASSES,
            palette,
            **more,
        )

    with pytest.raises(ValueError, match=r'\(1, 2, 2\)'):
        write(images=images[:1])
    with pytest.raises(ValueError, match=r'\(0, 0, 0\)'):
        write([], [], [])
    with pytest.raises(ValueError, match='palette has 1'):
        write(palette=PALETTE[:1])
    with pytest.raises(ValueError, match='max_rows'):
        write(max_rows=0)
    with pytest.raises(ValueError, match='sample 1 differ'):
        write(truths=[truths[0], truths[1][1:]])
    with pytest.raises(ValueError, match=r'Sample 0 has labels .* \[2\]'):
        write(predictions=[predictions[0] + 1, predictions[1]])
    assert not list(tmp_path.iterdir())


def test_of_a_model_and_its_data_set(tmp_path):
    pytest.importorskip('skimage')
    pytest.importorskip('mmseg')
    from mmengine.config import Config, ConfigDict
    from mmseg.registry import DATASETS, MODELS
    from mmseg.utils import register_all_modules

    from mmvssm.datasets import (
        QUICKSTART_CLASSES,
        QUICKSTART_PALETTE,
        make_quickstart_dataset,
    )

    register_all_modules(init_default_scope=True)
    root = make_quickstart_dataset(tmp_path / 'data', 1, 4, 64)
    cfg = Config.fromfile(REPO / 'configs/_base_/datasets/quickstart.py')
    dataset_cfg = dict(cfg.val_dataloader.dataset, data_root=str(root))
    resize = dict(type='Resize', scale=(96, 96), keep_ratio=True)
    load, *rest = cfg.test_pipeline
    dataset = DATASETS.build(dict(dataset_cfg, pipeline=[load, resize, *rest]))
    model = MODELS.build(
        dict(
            type='EncoderDecoder',
            data_preprocessor=dict(
                type='SegDataPreProcessor', test_cfg=dict(size_divisor=2)
            ),
            backbone=dict(
                type='UNet',
                base_channels=4,
                num_stages=2,
                strides=(1, 1),
                enc_num_convs=(1, 1),
                dec_num_convs=(1,),
                downsamples=(True,),
                enc_dilations=(1, 1),
                dec_dilations=(1,),
            ),
            decode_head=dict(
                type='FCNHead',
                in_channels=4,
                channels=4,
                num_convs=0,
                concat_input=False,
                in_index=-1,
                num_classes=len(QUICKSTART_CLASSES),
            ),
            test_cfg=ConfigDict(mode='whole'),
        )
    )
    model.train()
    path = write_model_contact_sheet(tmp_path / 'sheet.png', model, dataset, max_rows=4)
    picture = np.asarray(Image.open(path).convert('RGB'))
    assert share(picture, QUICKSTART_PALETTE[0]) > 0.03, 'the true background'
    assert model.training
