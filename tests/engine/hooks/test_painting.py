from types import SimpleNamespace

import numpy as np
import pytest
from mmengine.dataset import Compose
from PIL import Image

pytest.importorskip('mmcv')
from mmcv.transforms import LoadImageFromFile

from mmvssm.engine import PaintingHook


def paint(path, load, wrapped=False, **options):
    """What the hook gives a visualizer of one tested image."""
    painted = []
    visualizer = SimpleNamespace(
        _vis_backends={'local': None},
        add_datasample=lambda name, image, **given: painted.append(
            (name, image, given)
        ),
    )
    dataset = SimpleNamespace(pipeline=Compose([load]))
    if wrapped:
        dataset = SimpleNamespace(datasets=[SimpleNamespace(dataset=dataset)])
    loop = SimpleNamespace(dataloader=SimpleNamespace(dataset=dataset))
    runner = SimpleNamespace(test_loop=loop, visualizer=visualizer)
    hook, sample = PaintingHook(**options), SimpleNamespace(img_path=str(path))
    hook.before_test(runner)
    hook.after_test_iter(runner, 0, None, [sample])
    ((name, image, given),) = painted
    assert name == f'test_{path.name}' and given['data_sample'] is sample
    assert given['show'] is options.get('show', False)
    assert bool(visualizer._vis_backends) is not given['show']
    assert image.dtype == np.uint8
    return image


@pytest.mark.parametrize('wrapped', [False, True])
@pytest.mark.parametrize('show', [False, True])
def test_images_are_turned_as_the_test_turns_them(tmp_path, wrapped, show):
    path, turned = tmp_path / 'a.png', Image.Exif()
    turned[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(path, exif=turned)
    load = LoadImageFromFile(color_type='color_ignore_orientation')
    image = paint(path, load, wrapped, show=show)
    np.testing.assert_array_equal(image, pixels)
    image = paint(path, LoadImageFromFile())
    np.testing.assert_array_equal(image, np.rot90(pixels, -1))


def test_bands_of_a_tiff_file(tmp_path):
    tifffile = pytest.importorskip('tifffile')
    path = tmp_path / 'a.tif'
    bands = np.random.default_rng(0).integers(0, 256, (20, 30, 6), np.uint8)
    tifffile.imwrite(path, bands, photometric='minisblack')
    image = paint(path, LoadImageFromFile(imdecode_backend='tifffile'))
    np.testing.assert_array_equal(image, bands[..., :3])
