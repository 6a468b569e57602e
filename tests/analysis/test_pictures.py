import numpy as np
import pytest

from mmvssm.analysis.pictures import to_picture

RNG = np.random.default_rng(0)


def test_photographs_stay_as_they_are():
    image = RNG.integers(0, 256, (4, 6, 3), np.uint8)
    np.testing.assert_array_equal(to_picture(image), image[..., ::-1])
    np.testing.assert_array_equal(to_picture(image, bgr=False), image)
    # As loaded with to_float32=True.
    np.testing.assert_array_equal(
        to_picture(image.astype(np.float32)), image[..., ::-1]
    )


@pytest.mark.parametrize('channels', [4, 7])
def test_the_first_three_bands_are_drawn(channels):
    image = RNG.integers(0, 256, (4, 6, channels), np.uint8)
    np.testing.assert_array_equal(to_picture(image, bgr=False), image[..., :3])
    np.testing.assert_array_equal(to_picture(image), image[..., 2::-1])


@pytest.mark.parametrize('shape', [(4, 6), (4, 6, 1), (4, 6, 2)])
def test_grey(shape):
    image = RNG.integers(0, 256, shape, np.uint8)
    picture = to_picture(image)
    assert picture.shape == (4, 6, 3)
    for channel in range(3):
        np.testing.assert_array_equal(
            picture[..., channel], image.reshape(4, 6, -1)[..., 0]
        )


@pytest.mark.parametrize('dtype', [np.uint16, np.int16, np.float32, np.float64])
def test_other_numbers_are_stretched(dtype):
    image = np.array([[100, 300], [2000, 3000]]).astype(dtype)
    picture = to_picture(image)
    assert picture.dtype == np.uint8
    assert picture[..., 0].tolist() == [[0, 18], [167, 255]]
    assert to_picture(image / 3000)[1, 1, 0] == 255
    # A single number is no range.
    assert not to_picture(np.full((2, 2), 700).astype(dtype)).any()


def test_what_is_not_finite_is_black():
    image = np.array([[np.nan, np.inf], [0.5, 1.0]], np.float32)
    assert to_picture(image)[..., 0].tolist() == [[0, 0], [128, 255]]
