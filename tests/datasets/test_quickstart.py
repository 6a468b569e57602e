"""The quickstart data set: its files, its difficulty, its readers."""

import builtins
import json
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('skimage')

import warm
from mmvssm.datasets import (
    QUICKSTART_CLASSES,
    QUICKSTART_PALETTE,
    make_quickstart_dataset,
    quickstart,
)
from mmvssm.datasets.photos import SPLITS, load_regions
from tiny import REPO

NUM_CLASSES = len(QUICKSTART_CLASSES)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """Enough images for statistics, made in about two seconds."""
    return make_quickstart_dataset(
        tmp_path_factory.mktemp('data') / 'quickstart', 64, 32, seed=3
    )


def read_split(root, split):
    images = sorted(root.glob(f'images/{split}/*.jpg'))
    labels = sorted(root.glob(f'annotations/{split}/*.png'))
    assert [path.stem for path in images] == [path.stem for path in labels]
    return (
        [np.asarray(Image.open(path)) for path in images],
        [np.asarray(Image.open(path)) for path in labels],
    )


def files(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob('*')
        if path.is_file()
    }


def test_layout_and_labels(root):
    for split, count in zip(SPLITS, (64, 32)):
        images, labels = read_split(root, split)
        assert len(images) == count
        for image, label in zip(images, labels):
            assert image.dtype == label.dtype == np.uint8
            assert image.shape == (*label.shape, 3)
        shapes = {label.shape for label in labels}
        assert shapes == {(128, 128), (128, 160), (160, 128)}
        pixels = np.concatenate([label.ravel() for label in labels])
        shares = np.bincount(pixels, minlength=NUM_CLASSES + 1) / pixels.size
        assert len(shares) == NUM_CLASSES + 1
        assert 0.002 < shares[0] < 0.05, 'the ignored outlines are thin'
        assert 0.4 < shares[1] < 0.8, 'background'
        assert (shares[2:] > 0.01).all(), 'every class is there'
    assert {path.name for path in root.iterdir()} == {
        'images',
        'annotations',
        'meta.json',
    }
    assert {path.name for path in root.parent.iterdir()} == {root.name}


def test_meta(root):
    meta = json.loads(root.joinpath('meta.json').read_text())
    assert meta['classes'] == list(QUICKSTART_CLASSES)
    assert meta['palette'] == list(QUICKSTART_PALETTE)
    assert meta['settings'] == dict(num_train=64, num_val=32, size=128, seed=3)
    assert len({tuple(colour) for colour in QUICKSTART_PALETTE}) == NUM_CLASSES


def test_same_seed_same_bytes(tmp_path):
    make = make_quickstart_dataset
    first = files(make(tmp_path / 'a', 4, 2, 64, seed=5))
    again = files(make(tmp_path / 'b', 4, 2, 64, seed=5))
    fewer = files(make(tmp_path / 'c', 3, 1, 64, seed=5))
    other = files(make(tmp_path / 'd', 4, 2, 64, seed=6))
    assert first == again
    pictures = {name for name in fewer if name != 'meta.json'}
    assert all(first[name] == fewer[name] for name in pictures)
    assert all(first[name] != other[name] for name in first)
    assert len(set(first.values())) == len(first), 'no image comes twice'


@pytest.mark.parametrize('layout', ['ade20k', 'coco'])
def test_four_bands(tmp_path, layout):
    """The same scenes as with three, and heights that show the objects."""
    tifffile = pytest.importorskip('tifffile')
    if layout == 'coco':
        pytest.importorskip('pycocotools')
    make = make_quickstart_dataset
    photos = make(tmp_path / 'a', 4, 2, 64, seed=5, layout=layout)
    root = make(tmp_path / 'b', 4, 2, 64, seed=5, layout=layout, bands=4)
    again = make(tmp_path / 'c', 4, 2, 64, seed=5, layout=layout, bands=4)
    assert files(root) == files(again)
    assert make(root, 4, 2, 64, seed=5, layout=layout, bands=4) == root
    assert json.loads((root / 'meta.json').read_text())['settings']['bands'] == 4
    paths = sorted(root.rglob('*.tif'))
    assert len(paths) == 6
    for path in paths:
        image = tifffile.imread(path)
        photo = photos / path.relative_to(root).with_suffix('.jpg')
        photo = np.asarray(Image.open(photo), float)
        assert image.shape == (*photo.shape[:2], 4) and image.dtype == np.uint8
        # But for the losses of JPEG.
        pair = [x.mean(2).ravel() for x in (image[..., :3], photo)]
        assert np.corrcoef(*pair)[0, 1] > 0.97
        if layout == 'ade20k':
            name = path.relative_to(root / 'images').with_suffix('.png')
            labels = np.asarray(Image.open(root / 'annotations' / name))
            ground, objects = (
                image[..., 3][kind] for kind in (labels == 1, labels > 1)
            )
            assert ground.max() < 110 and np.median(objects) > 90
    with pytest.raises(FileExistsError, match="'bands': 4"):
        make(root, 4, 2, 64, seed=5, layout=layout)
    if layout == 'coco':
        content = (root / 'annotations/instances_val2017.json').read_text()
        names = {image['file_name'] for image in json.loads(content)['images']}
        assert names == {path.name for path in (root / 'val2017').iterdir()}


def test_the_splits_have_seeds_of_their_own(tmp_path, monkeypatch):
    """Even with the same photographs no scene would be in both splits."""
    regions = load_regions('training')
    monkeypatch.setattr(quickstart, 'load_regions', lambda split: regions)
    made = files(make_quickstart_dataset(tmp_path / 'data', 2, 2, 64))
    assert len(set(made.values())) == len(made)


def test_finished_data_is_reused_and_damaged_data_made_again(tmp_path):
    root = make_quickstart_dataset(tmp_path / 'data', 2, 1, 64)
    stamp = root.joinpath('meta.json').stat().st_mtime_ns
    before = files(root)
    make_quickstart_dataset(root, 2, 1, 64)
    assert root.joinpath('meta.json').stat().st_mtime_ns == stamp
    next(root.glob('images/training/*')).unlink()
    make_quickstart_dataset(root, 2, 1, 64)
    assert files(root) == before


def test_interrupted_run_leaves_nothing(tmp_path):

    def interrupt(jobs):
        yield from jobs[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_quickstart_dataset(tmp_path / 'data', 2, 1, 64, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_other_settings_need_overwrite(tmp_path):
    root = make_quickstart_dataset(tmp_path / 'data', 2, 1, 64)
    with pytest.raises(FileExistsError, match='overwrite=True'):
        make_quickstart_dataset(root, 2, 1, 64, seed=1)
    make_quickstart_dataset(root, 3, 1, 64, overwrite=True)
    assert len(read_split(root, 'training')[0]) == 3


@pytest.mark.parametrize('overwrite', [False, True])
def test_foreign_folder_is_left_alone(tmp_path, overwrite):
    keep = tmp_path / 'images' / 'training' / 'mine.jpg'
    keep.parent.mkdir(parents=True)
    keep.write_bytes(b'mine')
    with pytest.raises(FileExistsError, match='not made by this generator'):
        make_quickstart_dataset(tmp_path, 2, 1, 64, overwrite=overwrite)
    assert keep.read_bytes() == b'mine'


@pytest.mark.parametrize(
    'bad',
    [
        dict(num_train=0),
        dict(num_val=-1),
        dict(size=63),
        dict(size=128.0),
        dict(seed=-1),
        dict(num_train=True),
        dict(bands=1),
    ],
)
def test_bad_settings(tmp_path, bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f'{name} must be .* got {value}'):
        make_quickstart_dataset(tmp_path / 'data', **bad)
    assert not list(tmp_path.iterdir())


def test_missing_scikit_image(tmp_path, monkeypatch):
    original = builtins.__import__

    def without_skimage(name, *args, **kwargs):
        if name.startswith('skimage'):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', without_skimage)
    with pytest.raises(ImportError, match='pip install scikit-image'):
        make_quickstart_dataset(tmp_path / 'data', 1, 1, 64)


def colour_classifier_miou(train, val, bins=32, balanced=False):
    """mIoU of the best guess of a class from one pixel's colour alone.

    Args:
        train (tuple[list, list]): RGB images and label maps, 0 ignored.
        val (tuple[list, list]): The same, to be judged on.
        bins (int): Cells of the colour histogram along each channel.
        balanced (bool): Whether all classes count as equally frequent, which
            guesses rare ones more often.

    Returns:
        float: Mean over the classes of intersection over union.
    """

    def cells_and_classes(images, labels):
        pixels = np.concatenate([image.reshape(-1, 3) for image in images])
        labels = np.concatenate([label.ravel() for label in labels])
        pixels, labels = pixels[labels > 0], labels[labels > 0]
        cells = np.ravel_multi_index((pixels // (256 // bins)).T, (bins,) * 3)
        return cells, labels.astype(int) - 1

    cells, labels = cells_and_classes(*train)
    histogram = np.zeros((bins**3, NUM_CLASSES))
    np.add.at(histogram, (cells, labels), 1)
    if balanced:
        histogram /= histogram.sum(0)
    cells, labels = cells_and_classes(*val)
    confusion = np.zeros((NUM_CLASSES, NUM_CLASSES))
    np.add.at(confusion, (labels, histogram.argmax(1)[cells]), 1)
    right = np.diag(confusion)
    return np.mean(right / (confusion.sum(0) + confusion.sum(1) - right))


@pytest.mark.parametrize('balanced', [False, True])
def test_colours_alone_do_not_tell_the_classes(root, balanced):
    train, val = (read_split(root, split) for split in SPLITS)
    assert colour_classifier_miou(train, val, balanced=balanced) < 0.2
    # The classifier itself works: colours that give the class away.
    telling = [
        np.asarray([[0, 0, 0], *QUICKSTART_PALETTE], dtype=np.uint8)[label]
        for label in val[1]
    ]
    assert colour_classifier_miou((telling, val[1]), (telling, val[1])) == 1


def test_mmseg_reads_it(root):
    pytest.importorskip('mmseg')
    from mmengine.config import Config
    from mmseg.datasets import BaseSegDataset
    from mmseg.registry import DATASETS
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    cfg = Config.fromfile(REPO / 'configs/_base_/datasets/quickstart.py')
    dataset = DATASETS.build(dict(cfg.val_dataloader.dataset, data_root=str(root)))
    assert isinstance(dataset, BaseSegDataset)
    assert len(dataset) == 32
    assert dataset.metainfo['classes'] == QUICKSTART_CLASSES
    assert list(dataset.metainfo['palette']) == list(QUICKSTART_PALETTE)
    images, labels = read_split(root, 'validation')
    for index, (image, label) in enumerate(zip(images, labels)):
        sample = dataset[index]
        read = sample['data_samples'].gt_sem_seg.data.numpy()[0]
        np.testing.assert_array_equal(
            read, np.where(label == 0, 255, label.astype(int) - 1)
        )
        assert sample['inputs'].shape == (3, *image.shape[:2])


def test_tool(tmp_path, monkeypatch, capsys):
    tool = str(REPO / 'tools' / 'make_quickstart_data.py')
    root = make_quickstart_dataset(tmp_path / 'data', 2, 1, 64, seed=1)
    arguments = f'--root {root} --num-train 2 --num-val 1 --size 64'.split()

    monkeypatch.setattr(sys, 'argv', [tool, *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(tool, run_name='__main__')
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith('error: ') and '--overwrite' in said

    made = warm.run([tool, *arguments, '--overwrite'], cwd=REPO)
    assert made.returncode == 0, made.stderr
    assert str(root) in made.stdout
    assert '3/3' in made.stderr, 'a progress bar'
