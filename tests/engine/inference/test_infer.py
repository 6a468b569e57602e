import re
import runpy
import sys

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from torch import nn

pytest.importorskip('mmseg')

from mmcv.transforms import LoadImageFromFile

from mmvssm.analysis.pictures import transforms_of
from mmvssm.engine import UsageError
from mmvssm.engine.inference.infer import (
    ImageError,
    find_images,
    free_name,
    load_model,
    predict,
)
from tiny import REPO


def test_files_folders_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'in/deep').mkdir(parents=True)
    for name in ('in/b.JPG', 'in/deep/a.png', 'c[1].png'):
        Image.new('RGB', (4, 4)).save(name)
    (tmp_path / 'in/notes.txt').write_text('')
    found = find_images(['in', 'in/*.JPG', 'c[1].png', 'absent.jpg'])
    assert list(map(str, found)) == [
        'in/b.JPG',
        'in/deep/a.png',
        'c[1].png',
        'absent.jpg',
    ]
    assert find_images([f'{tmp_path}/in/**/*.png']) == [tmp_path / 'in/deep/a.png']
    for nothing in ('*.bmp', 'empty'):
        (tmp_path / 'empty').mkdir(exist_ok=True)
        with pytest.raises(UsageError, match='no image in'):
            find_images([nothing])


def test_names_do_not_collide(tmp_path):
    taken = set()
    names = [
        free_name(tmp_path / x, taken)
        for x in ('a.png', 'b/a.jpg', 'a_2.png', 'c/a.png')
    ]
    assert names == ['a', 'a_2', 'a_2_2', 'a_3']


@pytest.mark.parametrize('device', ['gpu', 'cuda:99'])
def test_no_such_device(device):
    with pytest.raises(UsageError, match=f"cannot use the device '{device}'"):
        load_model(Config(), 'absent.pth', device)


# ------------------------------------------------------- as the config's test reads
@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """One image of each kind that readers take in several ways."""
    tifffile = pytest.importorskip('tifffile')
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 30, 4), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels[..., :3]).save(folder / 'turned.jpg', exif=turned)
    Image.fromarray(pixels).save(folder / 'alpha.png')
    Image.fromarray(pixels[..., 0]).save(folder / 'grey.png')
    deep = pixels.astype(np.uint16) * 200
    cv2.imwrite(str(folder / 'deep.png'), deep[..., :3])
    cv2.imwrite(str(folder / 'depth.png'), deep[..., 0])
    tifffile.imwrite(folder / 'bands.tif', deep, photometric='minisblack')
    tifffile.imwrite(
        folder / 'floats.tif',
        np.dstack([pixels, pixels[..., :1]]).astype(np.float32),
        photometric='minisblack',
    )
    return folder


class Seen(nn.Module):
    """What :func:`predict` gives a model."""

    def __init__(self, transforms):
        super().__init__()
        self.transforms = transforms

    def test_step(self, data):
        (self.inputs,) = data['inputs']
        return [self]


READERS = {
    'turned.jpg': [
        dict(),
        dict(color_type='color_ignore_orientation'),
        dict(color_type='unchanged'),
        dict(imdecode_backend='pillow'),
        dict(color_type='grayscale'),
    ],
    'alpha.png': [dict(), dict(color_type='unchanged')],
    'grey.png': [dict(), dict(color_type='unchanged'), dict(to_float32=True)],
    'deep.png': [dict(), dict(color_type='unchanged')],
    'depth.png': [dict(), dict(color_type='unchanged')],
    'bands.tif': [dict(imdecode_backend='tifffile')],
    'floats.tif': [dict(imdecode_backend='tifffile')],
}


@pytest.mark.parametrize(
    'name, options',
    [(name, options) for name, some in READERS.items() for options in some],
    ids=str,
)
def test_reads_as_the_test_does(folder, name, options):
    init_default_scope('mmseg')
    dataset = DATASETS.build(
        dict(
            type='BaseSegDataset',
            data_prefix=dict(img_path=str(folder)),
            img_suffix=name,
            metainfo=dict(classes=('a', 'b')),
            pipeline=[
                dict(type='LoadImageFromFile', **options),
                dict(type='Resize', scale=(48, 32), keep_ratio=False),
                dict(type='PackSegInputs'),
            ],
        )
    )
    model = Seen(transforms_of(dataset))
    picture, _ = predict(model, folder / name)
    wanted = dataset[0]['inputs']
    assert model.inputs.dtype == wanted.dtype and torch.equal(model.inputs, wanted)
    # The picture to paint over is as high and wide as what was read.
    ignored = options.get('color_type') in ('color_ignore_orientation', 'unchanged')
    size = (30, 20, 3) if name == 'turned.jpg' and not ignored else (20, 30, 3)
    assert picture.shape == size and picture.dtype == np.uint8 and picture.std() > 20


@pytest.mark.parametrize(
    'name, options',
    [
        ('bands.tif', dict(imdecode_backend='tifffile')),
        ('alpha.png', dict(color_type='unchanged')),
        ('alpha.png', dict()),
    ],
    ids=str,
)
def test_the_picture_has_its_colours(folder, name, options):
    load = LoadImageFromFile(**options)
    picture, _ = predict(Seen([load, lambda found: dict(inputs=0)]), folder / name)
    wanted = np.asarray(Image.open(folder / 'alpha.png'))
    for channel in range(3):
        pair = (picture[..., channel].ravel(), wanted[..., channel].ravel())
        assert np.corrcoef(*pair)[0, 1] > 0.99


# --------------------------------------------------------- what is the image's fault
class Failing(Seen):
    def __init__(self, error):
        def load(results):
            return dict(results, img=np.zeros((4, 4, 3), np.uint8), inputs=0)

        super().__init__([load])
        self.error = error

    def test_step(self, data):
        raise self.error


@pytest.fixture
def image(tmp_path):
    Image.new('RGB', (4, 4)).save(tmp_path / 'a.png')
    return tmp_path / 'a.png'


@pytest.mark.parametrize(
    'error',
    [
        ValueError('too small\nand more'),
        RuntimeError('too small'),
        torch.OutOfMemoryError('too small'),
        OSError('too small'),
        AssertionError('too small'),
    ],
    ids=repr,
)
def test_what_a_model_says_of_an_image_is_one_line(image, error):
    with pytest.raises(ImageError, match='^too small$'):
        predict(Failing(error), image)


@pytest.mark.parametrize(
    'error',
    [TypeError(), KeyError('x'), AttributeError(), KeyboardInterrupt()],
    ids=repr,
)
def test_bugs_are_not_hidden(image, error):
    with pytest.raises(type(error)):
        predict(Failing(error), image)


def test_a_transform_that_fails_is_named(image):
    class Halve:
        def __call__(self, results):
            raise cv2.error('no such size')

    model = Failing(None)
    model.transforms.append(Halve())
    with pytest.raises(
        ImageError, match='^Halve cannot take an image of 4x4 pixels, 3 '
    ):
        predict(model, image)


def infer(monkeypatch, capsys, *arguments):
    """Exit code of tools/infer.py, and what it says."""
    monkeypatch.setattr(sys, 'argv', ['infer.py', *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPO / 'tools/infer.py'), run_name='__main__')
    return stop.value.code, capsys.readouterr().out


def test_images_that_the_model_refuses(tmp_path, monkeypatch, capsys):
    """Smaller than a patch, or than what the pyramid needs: the others go on."""
    from mmseg.registry import MODELS

    config = REPO / 'configs/upernet_vim_quickstart.py'
    init_default_scope('mmseg')
    model = revert_sync_batchnorm(MODELS.build(Config.fromfile(config).model))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'a.pth')
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'in').mkdir()
    sizes = dict(patch=(40, 7), pyramid=(31, 80), right=(80, 32))
    for name, size in sizes.items():
        Image.effect_noise(size, 90).convert('RGB').save(f'in/{name}.png')
    (tmp_path / 'in/text.png').write_text('no image')
    arguments = ('--config', config, '--checkpoint', 'a.pth', '--device', 'cpu')
    code, said = infer(monkeypatch, capsys, 'in', *arguments)
    assert code == 1 and '1 of 4 images segmented' in said
    reasons = dict(re.findall(r'skipped in/(\w+)\.png: (.*)', said))
    assert set(reasons) == {'patch', 'pyramid', 'text'}
    assert 'Vim takes images (B, 3, H, W) of at least 8x8 pixels' in reasons['patch']
    assert 'at least 4x4 patches, got 10x3' in reasons['pyramid']
    assert 'failed to load image' in reasons['text']
    assert {p.name for p in (tmp_path / 'outputs').iterdir()} == {
        'right_labels.png',
        'right_overlay.png',
    }
    code, said = infer(monkeypatch, capsys, 'in/text.png', *arguments)
    assert code == 1 and '0 of 1 images segmented' in said and 'skipped in/text' in said
