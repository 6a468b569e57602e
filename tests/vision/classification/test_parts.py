"""What recipes need and MMPretrain does not have."""

import math

import numpy as np
import pytest
import torch
from mmengine.registry import DATA_SAMPLERS, TRANSFORMS, DefaultScope
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import ColorJitter

from mmvssm.classification.data_preprocessor import erase_box
from mmvssm.engine import UsageError

CLASSES = 5
NORM = dict(mean=[100.0, 110.0, 120.0], std=[50.0, 60.0, 70.0], to_rgb=True)


# 3-Augment


def test_three_augment_is_that_of_pillow_and_torchvision():
    image = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    transform = TRANSFORMS.build(dict(type='mmvssm.ThreeAugment'))
    seen = set()
    for seed in range(8):
        np.random.seed(seed), torch.manual_seed(seed)
        found = transform(dict(img=image.copy()))['img']
        np.random.seed(seed), torch.manual_seed(seed)
        rgb = Image.fromarray(np.ascontiguousarray(image[..., ::-1]))
        kind = np.random.randint(3)
        if kind == 0:
            expected = Image.merge('RGB', [ImageOps.grayscale(rgb)] * 3)
        elif kind == 1:
            expected = ImageOps.solarize(rgb, threshold=128)
        else:
            expected = rgb.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2)))
        expected = np.asarray(ColorJitter(0.3, 0.3, 0.3)(expected))
        assert found.dtype == np.uint8 and found.flags.c_contiguous
        np.testing.assert_array_equal(found[..., ::-1], expected)
        seen.add(kind)
    assert seen == {0, 1, 2}


def test_simple_random_crop_is_made_of_other_parts():
    steps = [
        dict(type='mmpretrain.ResizeEdge', scale=32, edge='short', backend='pillow'),
        dict(
            type='mmpretrain.RandomCrop',
            crop_size=32,
            padding=4,
            padding_mode='reflect',
        ),
        dict(type='mmvssm.ThreeAugment'),
    ]
    found = dict(img=np.full((50, 40, 3), 9, np.uint8))
    for step in steps:
        found = TRANSFORMS.build(step)(found)
    assert found['img'].shape == (32, 32, 3)


# Batches


def preprocess(size=(4, 8, 8), seed=0, **options):
    """Normalised images before, and images and scores after."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (size[0], 3, *size[1:]), dtype=torch.uint8)
    labels = torch.arange(size[0]) % CLASSES
    net = MODELS.build(
        dict(type='mmvssm.ClsDataPreprocessor', num_classes=CLASSES, **NORM, **options)
    )
    np.random.seed(seed)
    samples = [DataSample().set_gt_label(int(label)) for label in labels]
    out = net(dict(inputs=images, data_samples=samples), training=True)
    plain = (images.flip(1).float() - net.mean) / net.std
    scores = [sample.get('gt_score') for sample in out['data_samples']]
    one_hot = torch.nn.functional.one_hot(labels, CLASSES).float()
    return plain, one_hot, out['inputs'], scores


def test_mixup_pairs_an_image_with_its_mirror_in_the_batch():
    plain, one_hot, mixed, scores = preprocess(mixup=0.8)
    np.random.seed(0)
    np.random.choice(1)  # MMPretrain's choice among the augmentations.
    weight = np.random.beta(0.8, 0.8)
    assert 0.01 < weight < 0.99
    torch.testing.assert_close(mixed, weight * plain + (1 - weight) * plain.flip(0))
    expected = weight * one_hot + (1 - weight) * one_hot.flip(0)
    torch.testing.assert_close(torch.stack(scores), expected)


def test_cutmix_takes_a_box_of_the_mirror_and_its_part_of_the_label():
    for seed in range(6):
        plain, one_hot, mixed, scores = preprocess((4, 9, 7), seed, cutmix=1.0)
        other = (mixed != plain).any(1)
        assert all(torch.equal(box, other[0]) for box in other)
        rows, columns = other[0].any(1).nonzero(), other[0].any(0).nonzero()
        assert other[0].sum() == len(rows) * len(columns)
        assert torch.equal(mixed, torch.where(other[:, None], plain.flip(0), plain))
        weight = 1 - other[0].float().mean()
        expected = weight * one_hot + (1 - weight) * one_hot.flip(0)
        torch.testing.assert_close(torch.stack(scores), expected)


def test_a_coin_chooses_between_the_two():
    kinds = set()
    for seed in range(12):
        plain, _, mixed, _ = preprocess(seed=seed, mixup=0.8, cutmix=1.0)
        taken = (mixed == plain) | (mixed == plain.flip(0))
        kinds.add('cutmix' if taken.all() else 'mixup')
    assert kinds == {'mixup', 'cutmix'}


def test_erasing_fills_a_box_with_normal_noise():
    torch.manual_seed(0), np.random.seed(0)
    height, width = 60, 40
    values, areas = [], []
    for _ in range(300):
        image = torch.full((3, height, width), 9.0)
        erase_box(image)
        erased = (image != 9).any(0)
        rows, columns = erased.any(1).sum().item(), erased.any(0).sum().item()
        assert erased.sum() == rows * columns
        areas.append(rows * columns / (height * width))
        values.append(image[:, erased].flatten())
        # A side may be rounded by half a pixel.
        low, high = (rows - 0.5) / (columns + 0.5), (rows + 0.5) / (columns - 0.5)
        assert high > 0.3 and low < 1 / 0.3
    assert min(areas) > 0.015 and max(areas) < 0.36
    assert np.mean(areas) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    values = torch.cat(values)
    assert values.mean().abs() < 0.01 and abs(values.std() - 1) < 0.01


def test_images_are_erased_by_chance_after_normalisation_and_before_mixing():
    torch.manual_seed(0)
    plain, one_hot, erased, scores = preprocess((400, 8, 8), erase=0.25)
    changed = (erased != plain).flatten(1).any(1)
    assert 0.19 < changed.float().mean() < 0.31
    assert torch.equal(torch.stack(scores), one_hot)
    # Mixed images have the noise of both.
    _, _, mixed, _ = preprocess((2, 8, 8), erase=1.0, mixup=0.8)
    assert torch.isfinite(mixed).all()
    plain, _, mixed, _ = preprocess((2, 32, 32), erase=1.0, cutmix=1.0)
    assert not ((mixed == plain) | (mixed == plain.flip(0))).all()


def test_nothing_happens_in_tests_and_without_options():
    plain, _, same, scores = preprocess()
    assert torch.equal(plain, same) and scores == [None] * 4
    net = MODELS.build(
        dict(
            type='mmvssm.ClsDataPreprocessor',
            num_classes=CLASSES,
            mixup=0.8,
            erase=1.0,
            **NORM,
        )
    )
    images = torch.zeros(2, 3, 8, 8)
    samples = [DataSample().set_gt_label(0) for _ in images]
    out = net(dict(inputs=images, data_samples=samples), training=False)
    assert torch.equal(out['inputs'], (images - net.mean) / net.std)


def test_two_ways_to_mix_are_refused():
    augments = dict(augments=[dict(type='Mixup', alpha=0.8)])
    with pytest.raises(UsageError, match='leave out one of the two'):
        preprocess(mixup=0.8, batch_augments=augments)


@pytest.mark.parametrize('name', ['mixup', 'cutmix', 'erase'])
@pytest.mark.parametrize('value', [-0.5, 1.5, float('nan'), 'much'])
def test_options_out_of_range_are_refused(name, value):
    if value == 1.5 and name != 'erase':
        preprocess(**{name: value})
        return
    with pytest.raises(UsageError, match=f'{name} of mmvssm.ClsDataPreprocessor must'):
        preprocess(**{name: value})


# Repeated augmentation


@pytest.mark.parametrize('world', [1, 3])
def test_epoch_of_repeated_augmentation_is_deits(world, monkeypatch):
    images, taken = 1000, []
    for rank in range(world):
        monkeypatch.setattr(
            'mmpretrain.datasets.samplers.repeat_aug.get_dist_info',
            lambda rank=rank: (rank, world),
        )
        sampler = DATA_SAMPLERS.build(
            dict(type='mmvssm.DeiTRepeatAugSampler', seed=0),
            default_args=dict(dataset=range(images)),
        )
        sampler.set_epoch(2)
        assert len(sampler) == images // 256 * 256 // world == len(list(sampler))
        taken.append(list(sampler))
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(images, generator=generator).tolist()
    repeated = [index for index in order for _ in range(3)]
    repeated += repeated[: math.ceil(3 * images / world) * world - 3 * images]
    length = images // 256 * 256 // world
    assert taken == [repeated[rank::world][:length] for rank in range(world)]


def test_too_few_images_to_repeat_are_refused():
    with pytest.raises(UsageError, match='takes a multiple of 256 images'):
        DATA_SAMPLERS.build(
            dict(type='mmvssm.DeiTRepeatAugSampler', seed=0),
            default_args=dict(dataset=range(255)),
        )


def test_parts_are_found_by_their_names():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        assert TRANSFORMS.get('mmvssm.ThreeAugment') is not None
        assert MODELS.get('mmvssm.MESAClassifier') is not None
        assert DATA_SAMPLERS.get('mmvssm.DeiTRepeatAugSampler') is not None
