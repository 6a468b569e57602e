"""Annotation files in COCO's format that contradict their images or a config."""

import json

import pytest
from mmengine.config import Config
from PIL import Image

from mmvssm.engine import UsageError, check_labels
from mmvssm.engine.labels.check import inspect_data
from tiny_det import needs_detection, write_coco, write_config

pytestmark = needs_detection


@pytest.fixture
def coco(tmp_path):
    return write_coco(tmp_path / 'coco')


@pytest.fixture
def cfg(coco, tmp_path):
    return Config.fromfile(write_config(tmp_path / 'tiny.py', coco))


def change(coco, how, split='train2017'):
    """Apply a function to the content of an annotation file."""
    path = coco / f'annotations/instances_{split}.json'
    content = json.loads(path.read_text())
    how(content)
    path.write_text(json.dumps(content))
    return str(path)


def refusal(cfg, *said):
    with pytest.raises(UsageError) as error:
        check_labels(cfg)
    text = str(error.value)
    for part in said:
        assert part in text, text
    return text


def test_sound_data_pass(cfg, said):
    check_labels(cfg)
    assert len(said) == 2 and all('78 of the 80' in text for text in said)
    train = inspect_data(cfg)[0].report
    assert (train.images, train.read) == (4, 4)
    assert train.sizes == {'64x80': 4} and train.channels == {3: 4}
    assert train.classes['person'] == {'objects': 2}
    assert train.classes['bicycle'] == {'objects': 2}
    assert train.classes['car'] == {'objects': 0}
    assert not train.of('error')
    assert any('78 of the 80 classes' in text for text in train.of('warning'))


def test_own_data_set_passes(tmp_path, said):
    from mmvssm.datasets import make_quickstart_dataset
    from tiny import REPO

    root = make_quickstart_dataset(
        tmp_path / 'q', num_train=20, num_val=20, size=96, layout='coco'
    )
    cfg = Config.fromfile(REPO / 'configs/mask_rcnn_vmamba_quickstart.py')
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = str(root)
    check_labels(cfg)
    assert not said


@pytest.mark.parametrize(
    ('key', 'said'),
    [
        ('bbox', 'has no bbox'),
        ('area', 'has no area'),
        ('segmentation', 'with_mask=False'),
    ],
)
def test_what_an_annotation_lacks(cfg, coco, key, said):
    path = change(coco, lambda content: content['annotations'][1].pop(key))
    refusal(cfg, path, 'annotation 2', said)


def test_boxes_by_their_corners(cfg, coco):
    def to_corners(content):
        for found in content['annotations']:
            left, top, width, height = found['bbox']
            found['bbox'] = [left + 20, top + 20, left + width + 20, top + height + 20]

    path = change(coco, to_corners)
    refusal(cfg, path, 'outside', '[left, top, width, height]')


def test_boxes_as_fractions(cfg, coco):
    def to_fractions(content):
        for found in content['annotations']:
            found['bbox'] = [0.1, 0.1, 0.5, 0.5]

    refusal(cfg, change(coco, to_fractions), 'no object', 'in pixels')


def test_no_objects(cfg, coco):
    path = change(coco, lambda content: content['annotations'].clear(), 'val2017')
    refusal(cfg, path, 'no object')


def test_ids_twice(cfg, coco):
    path = change(coco, lambda content: content['annotations'][1].update(id=1))
    refusal(cfg, path, 'annotation ids', 'number the annotations anew')


def test_a_palette_of_fewer_classes(cfg):
    metainfo = dict(classes=('person', 'bicycle'), palette=[[0, 0, 0]])
    cfg.train_dataloader.dataset.metainfo = metainfo
    refusal(cfg, '2 classes and a palette of 1 colours')


def test_image_ids_twice(cfg, coco):
    path = change(coco, lambda content: content['images'][1].update(id=1))
    refusal(cfg, path, 'image ids', 'number the images anew')


def test_what_only_the_evaluation_needs(cfg, coco):
    def without_iscrowd(content):
        for found in content['annotations']:
            found.pop('iscrowd', None)

    change(coco, without_iscrowd)
    check_labels(cfg)
    path = change(coco, without_iscrowd, 'val2017')
    refusal(cfg, path, 'iscrowd', 'add "iscrowd": 0')


def test_id_that_the_evaluation_takes_for_none(cfg, coco):
    def from_zero(content):
        for number, found in enumerate(content['annotations']):
            found['id'] = number

    change(coco, from_zero)
    check_labels(cfg)
    path = change(coco, from_zero, 'val2017')
    refusal(cfg, path, 'id 0', 'number the annotations from 1')


def test_another_size_than_the_image(cfg, coco):
    path = change(
        coco, lambda content: content['images'][0].update(width=64, height=80)
    )
    refusal(cfg, path, '000000000001.jpg', '64x80', '80x64')


def test_a_turned_photo(cfg, coco):
    """A labelling tool saw it upright, or not."""
    path = coco / 'train2017/000000000002.jpg'
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    refusal(cfg, str(path), 'EXIF', 'color_ignore_orientation')


@pytest.mark.parametrize('broken', [False, True])
def test_an_image_that_is_missing_or_broken(cfg, coco, broken):
    path = coco / 'train2017/000000000003.jpg'
    path.write_bytes(b'no image') if broken else path.unlink()
    refusal(cfg, str(path), 'cannot be read' if broken else 'missing')


def test_heads_for_other_classes(cfg):
    cfg.model.roi_head.mask_head.num_classes = 7
    refusal(cfg, 'tiny.py', 'roi_head.mask_head', 'num_classes is 7', 'num_classes=80')


def test_a_head_without_a_number_of_classes(cfg):
    """Then that of its class holds: 80."""
    del cfg.model.roi_head.bbox_head['num_classes']
    check_labels(cfg)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.metainfo = dict(classes=('person', 'bicycle'))
    refusal(cfg, 'bbox_head', 'num_classes is 80', 'num_classes=2')


def test_counts_of_what_is_left_out(cfg, coco):
    def spoil(content):
        first, second, third, _ = content['annotations']
        first.update(iscrowd=1)
        second.update(bbox=[3, 3, 0.5, 9])
        third.update(category_id=999)

    change(coco, spoil)
    train = inspect_data(cfg)[0].report
    assert train.ignored == {
        'smaller than a pixel': 1,
        'a category_id of no category': 1,
    }
    assert any(
        'without objects: 2, crowd regions: 1' in text for text in train.of('note')
    )
    assert any('category_id of no category' in text for text in train.of('warning'))


def test_no_json(cfg, coco):
    path = coco / 'annotations/instances_val2017.json'
    path.write_text(path.read_text()[:-40])
    refusal(cfg, str(path))
