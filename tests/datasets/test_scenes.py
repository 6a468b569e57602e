"""Scenes: exact masks, consistent labels and images, disjoint photographs."""

import numpy as np
import pytest

pytest.importorskip('skimage')

from mmvssm.datasets.photos import PHOTOS, SPLITS, load_regions, random_patch, split_box
from mmvssm.datasets.scenes import (
    BACKGROUND,
    OBJECT_CLASSES,
    SHAPES,
    TEXTURES,
    Scene,
    SceneObject,
    polygon_area,
    random_object,
    random_scene,
    rasterise,
)


@pytest.fixture(scope='module')
def regions():
    return load_regions('training')


def flat_object(category, coverage, colour=0.5):
    appearance = np.full((*coverage.shape, 3), colour, dtype=np.float32)
    return SceneObject(category, coverage, appearance, np.zeros_like(coverage))


@pytest.mark.parametrize('size', [(512, 512), (600, 400), (300, 451)])
@pytest.mark.parametrize('mirrored', [False, True])
def test_split_boxes_share_no_pixel_and_miss_none(size, mirrored):
    width, height = size
    seen = np.zeros((height, width), dtype=int)
    for split in SPLITS:
        left, top, right, bottom = split_box(width, height, split, mirrored)
        seen[top:bottom, left:right] += 1
    assert (seen == 1).all()


def test_regions_are_disjoint_and_hold_their_own_pixels(regions):
    import skimage.data

    validation = load_regions('validation')
    for ours, theirs, name in zip(regions, validation, PHOTOS):
        assert ours.photo == theirs.photo == name
        left, right = sorted([ours.box, theirs.box])
        assert left[2] <= right[0] or left[3] <= right[1]
        for region in (ours, theirs):
            x0, y0, x1, y1 = region.box
            photo = getattr(skimage.data, name)()
            photo = photo[0] if isinstance(photo, tuple) else photo
            if photo.ndim == 2:
                photo = np.stack([photo] * 3, -1)
            np.testing.assert_array_equal(region.image, photo[y0:y1, x0:x1])


def test_patch_stays_in_its_region(regions):
    from mmvssm.datasets.photos import PhotoRegion

    black = [PhotoRegion(r.photo, r.box, r.image.point(lambda _: 0)) for r in regions]
    for seed in range(20):
        patch = random_patch(black, 40, 60, np.random.default_rng(seed))
        assert patch.shape == (40, 60, 3)
        assert patch.std((0, 1)).max() < 1e-6
        patch = random_patch(regions, 40, 60, np.random.default_rng(seed))
        assert 0 <= patch.min() and patch.max() <= 1


def test_unknown_split():
    with pytest.raises(ValueError, match="got 'test'"):
        load_regions('test')


@pytest.mark.parametrize('shape', SHAPES)
def test_masks_have_the_area_of_their_outline(shape):
    """The side is the root of the area, at any pose inside the canvas."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        angle, centre = rng.uniform(0, 6.28), rng.uniform(60, 68, 2)
        cos, sin = np.cos(angle), np.sin(angle)
        pose = np.array([[cos, sin], [-sin, cos]]) * 40
        coverage = rasterise(
            tuple(outline @ pose + centre for outline in SHAPES[shape]), 128, 128
        )
        assert coverage.sum() == pytest.approx(40**2, rel=1e-5)
        y, x = np.mgrid[:128, :128] + 0.5
        for axis, middle in ((x, centre[0]), (y, centre[1])):
            assert (axis * coverage).sum() / coverage.sum() == pytest.approx(
                middle, abs=0.05
            )


def test_rasterise_is_exact_on_the_pixel_grid_and_between():
    square = np.array([[2, 1], [6, 1], [6, 5], [2, 5]], dtype=float)
    assert polygon_area(square) == 16
    expected = np.zeros((8, 8))
    expected[1:5, 2:6] = 1
    np.testing.assert_allclose(rasterise((square,), 8, 8), expected)
    expected[1:5, 2] = 0.75
    expected[1:5, 6] = 0.25
    np.testing.assert_allclose(rasterise((square + [0.25, 0],), 8, 8), expected)
    hole = square * 0.5 + [2, 1.5]
    expected = rasterise((square,), 8, 8) - rasterise((hole,), 8, 8)
    assert expected.sum() == 12
    np.testing.assert_allclose(rasterise((square, hole), 8, 8), expected)
    triangle = np.array([[0, 0], [1, 0], [0, 2]], dtype=float)
    np.testing.assert_allclose(rasterise((triangle,), 2, 1), [[0.75], [0.25]])


def test_rasterise_cuts_at_the_borders_and_agrees_with_sampling():
    """A ring that leaves the canvas on two sides, against 32^2 samples."""
    outlines = tuple(outline * 30 + [3.3, 35.8] for outline in SHAPES['ring'])
    whole = rasterise(tuple(outline + [60, 60] for outline in outlines), 200, 200)
    coverage = rasterise(outlines, 40, 50)
    np.testing.assert_allclose(coverage, whole[60:100, 60:110], atol=1e-6)
    fine = (np.arange(40 * 32) + 0.5) / 32
    x, y = np.meshgrid(fine, fine)
    radii = [np.hypot(*(outline[0] - [3.3, 35.8])) for outline in outlines]
    distance = np.hypot(x - 3.3, y - 35.8)
    inside = (distance < radii[0]) & (distance > radii[1])
    sampled = inside.reshape(40, 32, 40, 32).mean((1, 3))
    # The circles are polygons of 48 sides.
    np.testing.assert_allclose(coverage[:, :40], sampled, atol=0.08)


def test_labels_follow_what_is_visible():
    back, front = np.zeros((2, 4, 4), dtype=np.float32)
    back[:, :2] = 1
    back[:, 2] = 0.5
    front[2:] = 1
    front[1] = 0.2
    scene = Scene(
        np.zeros((4, 4, 3), dtype=np.float32),
        (flat_object(3, back), flat_object(5, front, 1.0)),
    )
    visible = scene.visible_coverage()
    np.testing.assert_allclose(visible.sum(0), 1, atol=1e-6)
    np.testing.assert_allclose(visible[1], back * (1 - front))
    np.testing.assert_allclose(visible[2], front)
    np.testing.assert_array_equal(
        scene.label_map(), [[3, 3, 0, 1], [3, 3, 0, 1], [5, 5, 5, 5], [5, 5, 5, 5]]
    )
    image = scene.image()
    np.testing.assert_allclose(image[0, :, 0], [0.5, 0.5, 0.25, 0])
    np.testing.assert_allclose(image[2:], 1)


def test_touching_objects_of_a_class_have_no_outline_between_them():
    left = np.array([[1, 0.5, 0]], dtype=np.float32)
    scene = Scene(
        np.zeros((1, 3, 3), dtype=np.float32),
        (flat_object(2, 1 - left), flat_object(2, left)),
    )
    # 0.5 in front, half of the other 0.5 behind: 0.75 of the pixel.
    np.testing.assert_array_equal(scene.label_map(), [[2, 2, 2]])


def test_shadow_falls_behind_the_object_only():
    coverage = np.array([[1, 0]], dtype=np.float32)
    item = SceneObject(
        2,
        coverage,
        np.full((1, 2, 3), 0.8, np.float32),
        np.full((1, 2), 0.5, np.float32),
    )
    image = Scene(np.full((1, 2, 3), 0.6, np.float32), (item,)).image()
    np.testing.assert_allclose(image[0, :, 0], [0.8, 0.3], rtol=1e-6)


@pytest.mark.parametrize('height, width', [(64, 64), (96, 160), (200, 128)])
def test_random_scene(regions, height, width):
    for seed in range(4):
        scene = random_scene(regions, height, width, np.random.default_rng(seed))
        assert 1 <= len(scene.objects) <= 5
        image, labels = scene.image(), scene.label_map()
        assert image.shape == (height, width, 3)
        assert labels.shape == (height, width)
        assert 0 <= image.min() and image.max() <= 1
        categories = {item.category for item in scene.objects}
        assert set(np.unique(labels)) <= {0, BACKGROUND} | categories
        visible = scene.visible_coverage()[1:].sum((1, 2))
        whole = np.array([item.coverage.sum() for item in scene.objects])
        assert (visible > 0.3 * whole).all(), 'no object is buried'


def test_classes_differ_in_shape_or_texture():
    kinds = {(kind.shape, kind.texture) for kind in OBJECT_CLASSES}
    assert len(kinds) == len(OBJECT_CLASSES)
    assert {kind.shape for kind in OBJECT_CLASSES} <= set(SHAPES)
    assert {kind.texture for kind in OBJECT_CLASSES} == {*TEXTURES, 'photo'}


def test_colours_are_drawn_alike_for_all_classes(regions):
    """Mean colours of the patterned classes agree within the noise."""
    centre = np.array([32.0, 32.0])
    means = []
    for category in range(2, len(OBJECT_CLASSES) + 2):
        rng = np.random.default_rng(9)
        colours = []
        for _ in range(60):
            patch = random_patch(regions, 64, 64, rng)
            item = random_object(category, centre, 30, patch, rng)
            colours.append(item.appearance[item.coverage > 0.5].mean(0))
        means.append(np.mean(colours, 0))
    assert np.ptp(means, axis=0).max() < 0.15
