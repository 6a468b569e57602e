import numpy as np
import pytest
from PIL import Image

from mmvssm.analysis.studies.images import open_images
from mmvssm.engine import UsageError


def write(path, height, width, value=0, mode='RGB'):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width, 3) if mode == 'RGB' else (height, width)
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)
    return path


def test_own_images():
    found = open_images(None, None, 3, seed=1)
    assert len(found) == 3
    first = found.load(0, (64, 96))
    assert first.pixels.shape == (64, 96, 3)
    assert first.pixels.dtype == np.uint8
    assert first.mask.shape == (64, 96)
    assert 0.02 < first.mask.mean() < 0.98
    again = open_images(None, None, 3, seed=1).load(0, (64, 96))
    assert np.array_equal(first.pixels, again.pixels)
    for other in (
        found.load(1, (64, 96)),
        open_images(None, None, 3).load(0, (64, 96)),
    ):
        assert not np.array_equal(first.pixels, other.pixels)


def test_own_images_with_labels():
    found = open_images(None, None, 8, labelled=True)
    assert found.labels == [0, 1, 2, 3, 4, 5, 6, 0]
    assert len(found.classes) == 7
    image = found.load(7, (64, 64))
    assert image.label == 0
    assert image.mask.any()


@pytest.mark.parametrize('shape', [(40, 100), (100, 40), (64, 96), (33, 47)])
def test_the_middle_is_cut_out(tmp_path, shape):
    """Columns (or rows) at both ends are cut off, and nothing is distorted."""
    height, width = shape
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    Image.fromarray(pixels).save(tmp_path / 'x.png')
    image = open_images([str(tmp_path / 'x.png')], None, 0).load(0, (48, 64))
    assert image.pixels.shape == (48, 64, 3)
    assert image.mask is None
    scale = max(48 / height, 64 / width)
    for channel, axis, side, whole in ((0, 1, 64, width), (1, 0, 48, height)):
        seen = image.pixels[..., channel].astype(float).mean(1 - axis)
        assert seen.mean() == pytest.approx(127.5, abs=4)
        spread = 255 * side / scale / whole
        assert np.ptp(seen) == pytest.approx(spread, abs=16)


def test_masks(tmp_path):
    image = write(tmp_path / 'images/a.jpg', 32, 64)
    mask = np.zeros((32, 64), np.uint8)
    mask[:, 32:48], mask[:, 48:] = 5, 1
    (tmp_path / 'masks').mkdir()
    Image.fromarray(mask).save(tmp_path / 'masks/a.png')
    for given in (tmp_path / 'masks', tmp_path / 'masks/a.png'):
        found = open_images([str(image)], None, 0, masks=[str(given)])
        assert np.array_equal(found.load(0, (32, 64)).mask, mask > 0)
    found = open_images([str(image)], None, 0, masks=[str(given)], background=[0, 1])
    assert np.array_equal(found.load(0, (16, 32)).mask, mask[::2, ::2] == 5)


def test_class_folders(tmp_path):
    for name in ('cat', 'dog'):
        for i in range(4):
            write(tmp_path / name / f'{i}.png', 8, 8, 50 * i)
    found = open_images(None, str(tmp_path), 0)
    assert list(found.classes) == ['cat', 'dog']
    assert found.labels == [0] * 4 + [1] * 4
    assert found.load(5, (8, 8)).label == 1
    assert found.load(5, (8, 8)).pixels[0, 0, 0] == 50
    few = open_images(None, str(tmp_path), 4)
    assert few.labels == [0, 0, 1, 1]


def test_refused(tmp_path):
    image = str(write(tmp_path / 'a.png', 8, 8))
    write(tmp_path / 'masks/a.png', 8, 16, mode='L')
    write(tmp_path / 'colours/a.png', 8, 8)
    write(tmp_path / 'set/train/cat/a.png', 8, 8)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'bad.png').write_bytes(b'no image')
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'a.png').read_bytes()[:40])

    def said(load=False, count=0, images=None, data=None, **options):
        with pytest.raises(UsageError) as caught:
            found = open_images(images, data, count, **options)
            if load:
                found.load(0, (8, 8))
        return str(caught.value)

    folder = str(tmp_path)
    assert '--masks needs --images' in said(masks=[folder])
    assert 'no folder' in said(data=f'{folder}/none')
    assert 'no image in' in said(data=f'{folder}/empty')
    assert 'no image in' in said(images=[f'{folder}/empty'])
    assert 'no class folders' in said(data=folder, labelled=True)
    assert f'Is it {folder}/set/train?' in said(data=f'{folder}/set', labelled=True)
    assert 'needs labels' in said(images=[image], labelled=True)
    assert 'cannot be read' in said(images=[f'{folder}/none.png'], load=True)
    assert 'cannot be read' in said(images=[f'{folder}/bad.png'], load=True)
    assert 'cannot be read' in said(images=[f'{folder}/cut.png'], load=True)
    assert 'no mask at' in said(images=[image], masks=[f'{folder}/empty'])
    assert '2 files for 1 image' in said(images=[image], masks=[image, image])
    given = dict(images=[image], load=True)
    assert '16x8 pixels, and its image' in said(masks=[f'{folder}/masks'], **given)
    assert 'one channel' in said(masks=[f'{folder}/colours'], **given)
