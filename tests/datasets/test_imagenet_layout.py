"""The quickstart data set in ImageNet's layout: its folders, and what they hold."""

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('skimage')

import warm
from mmvssm.datasets import make_quickstart_dataset
from mmvssm.datasets.layouts import OBJECT_NAMES, OBJECT_PALETTE, ImageNetLayout
from mmvssm.datasets.photos import load_regions
from mmvssm.datasets.scenes import OBJECT_CLASSES, random_object_scene
from tiny import REPO

COUNTS = {'train': 70, 'val': 38}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'quickstart_cls'
    return make_quickstart_dataset(folder, *COUNTS.values(), seed=3, layout='imagenet')


def files(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob('*')
        if path.is_file()
    }


def read_split(root, split):
    """Images, and the numbers of their folders."""
    folders = sorted(path for path in (root / split).iterdir())
    pairs = [
        (np.asarray(Image.open(path)), label)
        for label, folder in enumerate(folders)
        for path in sorted(folder.iterdir())
    ]
    return zip(*pairs)


def test_every_class_has_a_folder_of_as_many_images(root):
    for split, count in COUNTS.items():
        images, labels = read_split(root, split)
        found = np.bincount(labels)
        assert len(found) == len(OBJECT_NAMES) and found.sum() == count
        assert found.max() - found.min() <= 1
        assert {image.dtype for image in images} == {np.dtype(np.uint8)}
        shapes = {image.shape for image in images}
        assert shapes == {(128, 128, 3), (128, 160, 3), (160, 128, 3)}
    assert {path.name for path in root.iterdir()} == {'train', 'val', 'meta.json'}
    assert {path.name for path in root.parent.iterdir()} == {root.name}


def test_classes_are_in_the_order_of_their_folders(root):
    meta = json.loads((root / 'meta.json').read_text())
    folders = sorted(path.name for path in (root / 'train').iterdir())
    assert [name.replace(' ', '_') for name in meta['classes']] == folders
    colours = dict(zip(OBJECT_NAMES, map(tuple, OBJECT_PALETTE)))
    assert {
        name: tuple(colour) for name, colour in zip(meta['classes'], meta['palette'])
    } == colours
    assert len(set(colours.values())) == len(OBJECT_NAMES)


def test_the_class_is_that_of_the_object_that_covers_most():
    regions, others = load_regions('training'), []
    for index in range(60):
        category = 2 + index % len(OBJECT_CLASSES)
        rng = np.random.default_rng([7, index])
        scene = random_object_scene(category, regions, 64, 80, rng)
        covered = scene.visible_coverage()[1:].sum((1, 2))
        assert scene.objects[0].category == category
        assert covered[0] > 1.4 * covered[1:].max(initial=0)
        small = [item.category for item in scene.objects[1:]]
        assert category not in small
        others += [(kind - category) % 7 for kind in small]
    # Nor do the small ones tell which one the large one is.
    assert set(others) == {1, 2, 3, 4, 5, 6} and len(others) > 60


def test_colours_alone_do_not_tell_the_classes(root):
    def histograms(images):
        cells = [image.reshape(-1, 3) // 64 @ (16, 4, 1) for image in images]
        counts = np.stack([np.bincount(cell, minlength=64) for cell in cells])
        return np.sqrt(counts / counts.sum(1, keepdims=True))

    def nearest(train, labels, val):
        return np.asarray(labels)[(val @ train.T).argmax(1)]

    (train, labels), (val, truth) = (read_split(root, split) for split in COUNTS)
    guessed = nearest(histograms(train), labels, histograms(val))
    assert (guessed == truth).mean() < 0.4
    # The guesser itself works: colours that give the class away.
    tinted = [
        [np.full((8, 8, 3), OBJECT_PALETTE[x]) for x in xs] for xs in (labels, truth)
    ]
    guessed = nearest(histograms(tinted[0]), labels, histograms(tinted[1]))
    assert (guessed == truth).all()


def test_same_settings_same_bytes(tmp_path):
    def make(name, num_train=4, **settings):
        folder = tmp_path / name
        return files(
            make_quickstart_dataset(
                folder, num_train, 2, 64, layout='imagenet', **settings
            )
        )

    first = make('a', seed=5)
    assert first == make('b', seed=5)
    fewer, other = make('c', 3, seed=5), make('d', seed=6)
    pictures = {name for name in fewer if name != 'meta.json'}
    assert len(pictures) == 5
    assert all(first[name] == fewer[name] for name in pictures)
    assert all(first[name] != other[name] for name in first)
    assert len(set(first.values())) == len(first), 'no image comes twice'


def test_damaged_data_is_made_again_and_other_data_kept(tmp_path):
    root = make_quickstart_dataset(tmp_path / 'data', 2, 1, 64, layout='imagenet')
    before = files(root)
    stamp = (root / 'meta.json').stat().st_mtime_ns
    make_quickstart_dataset(root, 2, 1, 64, layout='imagenet')
    assert (root / 'meta.json').stat().st_mtime_ns == stamp
    next(root.glob('train/*/*.jpg')).unlink()
    make_quickstart_dataset(root, 2, 1, 64, layout='imagenet')
    assert files(root) == before
    with pytest.raises(FileExistsError, match='overwrite=True'):
        make_quickstart_dataset(root, 3, 1, 64, layout='imagenet')
    with pytest.raises(FileExistsError, match='not made by this generator'):
        make_quickstart_dataset(root, 2, 1, 64, overwrite=True)
    assert files(root) == before


def test_four_bands(tmp_path):
    tifffile = pytest.importorskip('tifffile')
    root = make_quickstart_dataset(
        tmp_path / 'data', 2, 1, 64, layout='imagenet', bands=4
    )
    paths = sorted(root.glob('*/*/*'))
    assert [path.suffix for path in paths] == ['.tif'] * 3
    assert all(tifffile.imread(path).shape[2] == 4 for path in paths)


def test_tool(tmp_path):
    tool = REPO / 'tools/make_quickstart_data.py'
    sizes = ['--num-train', '7', '--num-val', '1', '--size', '64']
    made = warm.run([tool, '--classification', *sizes], cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert 'of 7 classes are in data/quickstart_cls' in made.stdout
    for name in ImageNetLayout.classes:
        folder = tmp_path / 'data/quickstart_cls/train' / name.replace(' ', '_')
        assert len(list(folder.iterdir())) == 1
    again = warm.run([tool, '--layout', 'imagenet', *sizes[:-1], '96'], cwd=tmp_path)
    assert again.returncode == 2 and 'Traceback' not in again.stderr
    assert again.stderr.rpartition('error: ')[2].startswith('data/quickstart_cls')
