"""Masks that contradict a config do not train; others do, without a word."""

import shutil

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from mmvssm.engine import UsageError, check_labels
from mmvssm.engine.labels import check
from mmvssm.engine.labels.check import inspect_data
from tiny import REPO, write_ade, write_config

pytest.importorskip('mmseg')

NAMES = ('ground', 'thing', 'third', 'fourth', 'fifth', 'sixth', 'seventh', 'eighth')


class Data:
    """A data set whose masks are blocks of some numbers, and its config."""

    def __init__(self, folder):
        self.root = write_ade(folder / 'data', 4, 3)
        self.config = folder / 'tiny.py'
        write_config(self.config, self.root)

    def masks(self, split='*'):
        return sorted(self.root.glob(f'annotations/{split}/*.png'))

    def paint(self, *numbers, split='*'):
        for path in self.masks(split):
            columns = np.resize(np.uint8(numbers), 8).repeat(10)
            Image.fromarray(np.tile(columns, (64, 1))).save(path)
        return self

    def cfg(self, reduces=False, classes=2, heads=None, **dataset):
        cfg = Config.fromfile(self.config)
        for loader in (cfg.train_dataloader, cfg.val_dataloader):
            loader.dataset.type = 'BaseSegDataset'
            loader.dataset.update(
                reduce_zero_label=reduces,
                metainfo=dict(classes=NAMES[:classes]),
                **dataset,
            )
        for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
            head.num_classes = heads or classes
        cfg.test_dataloader = cfg.val_dataloader
        return cfg


@pytest.fixture
def data(tmp_path):
    return Data(tmp_path)


def refusal(cfg, *said):
    """The message of a refusal, which has all of ``said``."""
    with pytest.raises(UsageError) as error:
        check_labels(cfg)
    text = str(error.value)
    for part in said:
        assert part in text, text
    assert 'check_data.py' in text and 'MMVSSM_DATA_CHECK=0' in text
    return text


# --------------------------------------------------------------- rows of the table
def test_0_and_255(data):
    cfg = data.paint(0, 255).cfg()
    refusal(cfg, '.png', 'ignored', '1 in place of 255', "'ground'")


def test_0_and_255_with_reduce_zero_label(data):
    cfg = data.paint(0, 255).cfg(reduces=True)
    refusal(cfg, 'every pixel', '.png', 'reduce_zero_label=False', '255 is a class')


def test_0_and_1_with_reduce_zero_label(data):
    cfg = data.paint(0, 1).cfg(reduces=True)
    refusal(cfg, '.png', 'reduce_zero_label=False')


def test_all_0(data):
    refusal(data.paint(0).cfg(), 'one class only', '.png', 'nothing to tell apart')


@pytest.mark.parametrize('split', ['training', 'validation'])
def test_a_label_of_no_class(data, split):
    cfg = data.paint(0, 1).paint(0, 7, split=split).cfg()
    text = refusal(cfg, 'label 7', '50.00%', 'metainfo', 'num_classes')
    assert f'{split}/' in text


def test_num_classes_1(data):
    refusal(data.paint(0, 1).cfg(heads=1), 'tiny.py', 'num_classes=2', 'decode_head')


@pytest.mark.parametrize('colours', [1, 8])
def test_a_palette_of_other_classes(data, colours):
    cfg = data.paint(0, 1).cfg()
    cfg.train_dataloader.dataset.metainfo.palette = [[0, 0, 0]] * colours
    refusal(cfg, f'2 classes and a palette of {colours} colours', '_delete_=True')


def test_rgb_mask(data):
    path = data.paint(0, 1).masks('training')[1]
    Image.open(path).convert('RGB').save(path)
    refusal(data.cfg(), str(path), '3 channels', 'one channel')


def test_mask_of_another_size(data):
    path = data.paint(0, 1).masks('training')[2]
    Image.open(path).resize((40, 32), Image.Resampling.NEAREST).save(path)
    refusal(data.cfg(), str(path), '32x40', '64x80')


@pytest.mark.parametrize('split', ['training', 'validation'])
def test_a_missing_mask(data, split):
    path = data.paint(0, 1).masks(split)[-1]
    path.unlink()
    text = refusal(data.cfg(), str(path), 'missing', 'seg_map_suffix')
    assert 'more' not in text, 'said once'


@pytest.mark.parametrize(('heads', 'classes'), [(8, 2), (2, 8)])
def test_heads_for_other_classes(data, heads, classes):
    cfg = data.paint(*range(classes)).cfg(heads=heads, classes=classes)
    text = refusal(cfg, f'num_classes is {heads}', f'has {classes}', 'decode_head')
    assert f'num_classes={classes}' in text and 'tiny.py' in text


# -------------------------------------------------------------------- no false alarm
def test_a_validation_of_one_class_is_only_warned_of(data, said):
    check_labels(data.paint(0, 1).paint(0, split='validation').cfg())
    assert len(said) == 1 and 'one class only' in said[0] and said[0].startswith('val')


@pytest.mark.parametrize(
    ('numbers', 'options'),
    [
        ((0, 1), {}),
        ((0, 1, 255), {}),
        ((0, 1, 2), dict(reduces=True)),
        ((1, 2), dict(reduces=True)),
        ((0, 1, 2, 255), dict(reduces=True)),
        ((0, 1, 2), dict(classes=3)),
    ],
)
def test_sound_masks_pass_without_a_word(data, numbers, options, said, capfd):
    data.paint(*numbers)
    cfg = data.cfg(**options)
    check_labels(cfg)
    assert not said
    assert capfd.readouterr() == ('', '')
    for report, *_ in inspect_data(cfg):
        assert not report.of('error', 'warning')


@pytest.mark.parametrize('name', ['quickstart', 'ade20k'])
def test_own_data_sets_pass(tmp_path, name, said):
    from mmvssm.datasets import make_quickstart_dataset

    if name == 'quickstart':
        cfg = Config.fromfile(REPO / 'configs/upernet_vmamba_quickstart.py')
        root = make_quickstart_dataset(tmp_path / 'q', num_train=12, num_val=8, size=64)
    else:
        # 0 is void, three of 150 classes occur.
        root = write_ade(tmp_path / 'ade')
        cfg = Config.fromfile(write_config(tmp_path / 'tiny.py', root))
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = str(root)
    check_labels(cfg)
    if name == 'quickstart':
        assert not said


def test_wrapped_data_sets_are_looked_into_one_by_one(data):
    cfg = data.paint(0, 1).cfg()
    leaf = cfg.train_dataloader.dataset
    good, bad = leaf.copy(), Config(dict(leaf)).to_dict()
    bad['data_prefix'] = dict(
        img_path='images/validation', seg_map_path='annotations/validation'
    )
    cfg.train_dataloader.dataset = dict(
        type='RepeatDataset',
        times=3,
        dataset=dict(type='ConcatDataset', datasets=[good, bad]),
    )
    check_labels(cfg)
    reports = [found.report for found in inspect_data(cfg)]
    assert [report.images for report in reports] == [4, 3, 3]
    assert [report.split for report in reports] == ['train', 'train', 'val+test']
    data.paint(0, 9, split='validation')
    refusal(cfg, 'label 9')


def test_crops_do_not_hide_labels(data):
    """The annotation itself is read, not what a random crop leaves of it."""
    cfg = data.paint(0, 1).cfg()
    path = data.masks('training')[0]
    mask = np.array(Image.open(path))
    mask[-1, -1] = 5
    Image.fromarray(mask).save(path)
    cfg.train_dataloader.dataset.pipeline.insert(
        2, dict(type='RandomCrop', crop_size=(8, 8))
    )
    refusal(cfg, 'label 5', str(path))


def test_a_transform_of_ones_own_may_change_labels(data, monkeypatch):
    from mmseg.registry import TRANSFORMS

    class WriteOne:
        def __call__(self, results):
            results['gt_seg_map'][results['gt_seg_map'] == 255] = 1
            return results

    monkeypatch.setitem(TRANSFORMS.module_dict, 'WriteOne', WriteOne)
    cfg = data.paint(0, 255).cfg()
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        place = [part.type for part in loader.dataset.pipeline].index('LoadAnnotations')
        loader.dataset.pipeline.insert(place + 1, dict(type='WriteOne'))
    check_labels(cfg)


def test_binary_head_of_one_output(data):
    cfg = data.paint(0, 1).cfg()
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        head.out_channels = 1
        head.loss_decode = dict(type='CrossEntropyLoss', use_sigmoid=True)
    check_labels(cfg)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.metainfo = dict(classes=('thing',))
    refusal(cfg, "('background', 'thing')")


def test_a_head_that_ignores_a_class(data):
    cfg = data.paint(0, 1, 2).cfg(classes=3)
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        head.ignore_index = 0
    check_labels(cfg)
    data.paint(0, 1, 2, 255)
    refusal(cfg, 'label 255', 'ignore_index=255')


def test_a_rare_class_is_looked_for_beyond_the_sample(data, said):
    """One of 200 images has a second class."""
    data.paint(0)
    folder, masks = (
        data.root / name / 'training' for name in ('images', 'annotations')
    )
    for number in range(4, 200):
        shutil.copy(folder / '0.jpg', folder / f'{number}.jpg')
        shutil.copy(masks / '0.png', masks / f'{number}.png')
    rare = masks / '117.png'
    mask = np.array(Image.open(rare))
    mask[:5] = 1
    Image.fromarray(mask).save(rare)
    data.paint(0, 1, split='validation')
    cfg = data.cfg()
    (found,) = inspect_data(cfg, ('train',), 64)
    assert found.report.read == 64
    assert 'one class only' in found.report.of('warning')[0]
    assert not found.report.of('error'), 'a sample proves nothing'
    check_labels(cfg)
    assert not said


def test_a_test_set_without_labels(data):
    cfg = data.paint(0, 1).cfg()
    cfg.test_dataloader = Config(dict(cfg.val_dataloader)).copy()
    dataset = cfg.test_dataloader.dataset
    dataset.data_prefix = dict(img_path='images/validation')
    dataset.pipeline = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]
    (found,) = inspect_data(cfg, ('test',))
    assert not found.report.of('error', 'warning') and found.report.read == 3


def test_the_way_out(data, monkeypatch):
    cfg = data.paint(0, 255).cfg()
    monkeypatch.setenv('MMVSSM_DATA_CHECK', '0')
    check_labels(cfg)


# ---------------------------------------------------------------------- more faults
def test_labels_that_begin_at_1(data):
    refusal(data.paint(1, 2).cfg(), 'label 2', 'reduce_zero_label=True')


def test_classes_0_to_2_with_reduce_zero_label(data):
    cfg = data.paint(0, 1, 2).cfg(reduces=True, classes=3)
    refusal(cfg, 'numbers 0 to 2 for 3 classes', 'reduce_zero_label=False')


def test_labels_of_16_bits_are_not_mixed_up(data):
    path = data.paint(0, 1).masks('training')[0]
    wide = np.array(Image.open(path)).astype(np.uint16) * 256
    Image.fromarray(wide).save(path)
    refusal(data.cfg(), str(path), '256', '8 bits')


@pytest.mark.parametrize('kind', ['images', 'annotations'])
def test_a_broken_file_is_named(data, kind):
    data.paint(0, 1)
    path = next(data.root.glob(f'{kind}/training/2.*'))
    path.write_bytes(path.read_bytes()[:60])
    refusal(data.cfg(), str(path), 'cannot be read')


def test_a_turned_photo(data):
    """Its pixels are loaded upright, its mask is not."""
    path = data.root / 'images/training/1.jpg'
    data.paint(0, 1)
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    cfg = data.cfg()
    refusal(cfg, str(path), 'EXIF', 'color_ignore_orientation')
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.pipeline[0].color_type = 'color_ignore_orientation'
    check_labels(cfg)


def test_images_of_another_ending(data):
    folder = data.paint(0, 1).root / 'images/training'
    (folder / '3.jpg').rename(folder / '3.JPG')
    report = inspect_data(data.cfg())[0].report
    assert any(
        '3.JPG' in text and 'img_suffix' in text for text in report.of('warning')
    )
    refusal(data.cfg(img_suffix='.png'), 'ends in .png', '0.jpg', 'img_suffix')


def test_a_mask_without_an_image(data):
    (data.paint(0, 1).root / 'images/training/1.jpg').unlink()
    (text,) = inspect_data(data.cfg())[0].report.of('warning')
    assert '1.png' in text and 'without an image' in text


def test_images_of_four_channels(data):
    path = data.paint(0, 1).root / 'images/training/1.jpg'
    cfg = data.cfg()
    Image.open(path).convert('RGBA').save(path, format='PNG')
    check_labels(cfg)  # mmcv leaves alpha out.
    cfg.train_dataloader.dataset.pipeline[0].color_type = 'unchanged'
    refusal(cfg, '3 and 4 channels', 'data_preprocessor.mean')


def test_images_whose_bands_come_first(data):
    tifffile = pytest.importorskip('tifffile')
    folder = data.paint(0, 1).root / 'images/training'
    for path in folder.iterdir():
        bands = np.zeros((4, 64, 80), np.uint16)
        tifffile.imwrite(path, bands, photometric='minisblack', planarconfig='separate')
    cfg = data.cfg()
    for step in cfg.train_dataloader.dataset.pipeline[:1]:
        step.imdecode_backend = 'tifffile'
    refusal(cfg, 'is 4x64', 'its bands come first')


def test_counts(data):
    cfg = data.paint(0, 1, 1, 255).cfg()
    train = inspect_data(cfg)[0].report
    assert (train.images, train.read) == (4, 4)
    assert train.sizes == {'64x80': 4} and train.channels == {3: 4}
    assert train.classes['ground'] == {'of the pixels': 0.25, 'images': 4}
    assert train.classes['thing'] == {'of the pixels': 0.5, 'images': 4}
    assert train.ignored == {'255 in the files, by ignore_index=255': 0.25}
    assert inspect_data(cfg, ('train',), images=2)[0].report.read == 2


def test_classes_never_seen(data):
    cfg = data.paint(0, 1).cfg(classes=3)
    whole, sample = (inspect_data(cfg, ('train',), n)[0].report for n in (None, 2))
    assert 'third' in whole.of('warning')[0]
    assert 'third' in sample.of('note')[0] and not sample.of('warning')


def test_other_ranks_are_told_and_do_not_read(data, monkeypatch):
    class Told:
        def gather(self, value):
            assert value == ''
            return ['what rank 0 found', '']

    monkeypatch.setattr(check, 'Ranks', Told)
    monkeypatch.setattr(check, 'is_main_process', lambda: False)
    monkeypatch.setattr(check, 'inspect_data', None)
    with pytest.raises(UsageError, match='what rank 0 found'):
        check_labels(data.cfg())


def test_a_data_set_that_is_not_of_mmseg_is_left_alone(data, monkeypatch):
    from mmseg.registry import DATASETS

    monkeypatch.setitem(DATASETS.module_dict, 'Own', lambda root: None)
    cfg = data.paint(0, 255).cfg()
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset = dict(type='Own', root='nowhere')
    check_labels(cfg)
    assert 'not looked into' in inspect_data(cfg)[0].report.of('note')[0]


def test_a_data_set_of_ones_own_that_takes_less(data, monkeypatch):
    from mmseg.registry import DATASETS

    class Own(DATASETS.get('BaseSegDataset')):
        def __init__(self, data_root, data_prefix, metainfo, pipeline):
            super().__init__(
                data_root=data_root,
                data_prefix=data_prefix,
                metainfo=metainfo,
                pipeline=pipeline,
            )

    monkeypatch.setitem(DATASETS.module_dict, 'Own', Own)
    cfg = data.paint(0, 255).cfg()
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.type = 'Own'
        for key in [*loader.dataset]:
            if key not in ('type', 'data_root', 'data_prefix', 'metainfo', 'pipeline'):
                loader.dataset.pop(key)
    refusal(cfg, '1 in place of 255')
