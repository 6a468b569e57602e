"""What the tools refuse of a classifier's config and data, in one sentence."""

import shutil

import pytest
import torch
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from PIL import Image

from mmvssm.engine import (
    UsageError,
    check_datasets,
    check_labels,
    load_config,
    scope_of,
)
from mmvssm.engine.configs.explain import explain
from mmvssm.engine.configs.image_sizes import inference_batches, training_batches
from mmvssm.engine.labels.check import findings, inspect_data
from mmvssm.engine.model_check.check import _find_error
from mmvssm.engine.model_check.probe import look
from mmvssm.registry import MODELS
from tiny_cls import CLASSES, PARTS, write_config, write_folders


@pytest.fixture
def root(tmp_path):
    return write_folders(tmp_path / 'data')


def config(root, more='', **options):
    return load_config(str(write_config(root.parent / 'c.py', root, more, **options)))


def refused(root, more='', **options):
    cfg = config(root, more, **options)
    with pytest.raises(UsageError) as error:
        check_datasets(cfg)
        check_labels(cfg)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_good_data(root):
    cfg = config(root)
    check_datasets(cfg)
    check_labels(cfg)
    reports = [found.report for found in inspect_data(cfg)]
    assert [(r.split, r.images, r.read) for r in reports] == [
        ('train', 12, 12),
        ('val+test', 6, 6),
    ]
    assert reports[0].classes == {name: {'images': 4} for name in CLASSES}
    assert not list(findings(inspect_data(cfg)))


def test_a_class_that_only_one_split_has(root):
    shutil.rmtree(root / 'val/cross')
    text = refused(root)
    assert 'data/val does not have the classes of' in text
    assert 'cross only in train' in text


def test_classes_in_another_order(root):
    shutil.move(root / 'val/blob', root / 'val/zebra')
    text = refused(root)
    assert 'zebra only in val' in text and 'blob only in train' in text


def test_an_empty_class(root):
    for path in (root / 'train/cross').iterdir():
        path.unlink()
    found = list(findings(inspect_data(config(root))))
    (text,) = found
    assert 'has no image of 1 of the 3 classes: cross.' in text


def test_another_number_of_classes(root):
    text = refused(root, num_classes=5)
    assert 'num_classes is 5 in model.head, model.data_preprocessor' in text
    text = refused(root, "model['data_preprocessor'].update(num_classes=4)")
    assert 'num_classes is 4 in model.data_preprocessor, but' in text


def test_a_label_that_is_no_class(root):
    (root / 'list.txt').write_text('train/blob/0.png 0\ntrain/cross/0.png 3\n')
    listed = "train_dataloader['dataset'].update(data_prefix='', ann_file='list.txt')"
    text = refused(root, listed)
    assert 'train/cross/0.png has the label 3, but there are 3 classes' in text


def test_an_image_that_cannot_be_read(root):
    path = root / 'train/blob/1.png'
    path.write_bytes(path.read_bytes()[:100])
    assert 'data/train/blob/1.png cannot be read' in refused(root)


def test_an_empty_file(root):
    (root / 'train/blob/1.png').write_bytes(b'')
    assert '1.png cannot be read: the file is empty. (' in refused(root)


def test_images_without_folders_of_classes(root):
    for path in list((root / 'train').glob('*/*')):
        path.rename(root / 'train' / f'{path.parent.name}_{path.name}')
    for folder in list((root / 'train').glob('*/')):
        folder.rmdir()
    assert 'data/train has no folders of classes' in refused(root)
    # A list says what they are.
    (root / 'list.txt').write_text('blob_0.png 0\n')
    check_datasets(config(root, "train_dataloader['dataset']['ann_file'] = 'list.txt'"))


def test_a_missing_image(root):
    (root / 'list.txt').write_text('train/blob/0.png 0\ntrain/cross/9.png 1\n')
    listed = "train_dataloader['dataset'].update(data_prefix='', ann_file='list.txt')"
    text = ' '.join(findings(inspect_data(config(root, listed))))
    assert 'train/cross/9.png of' in text and 'list.txt is missing' in text


def test_channels(root):
    Image.new('RGBA', (40, 40)).save(root / 'train/blob/0.png')
    unchanged = "train_pipeline[0].update(color_type='unchanged')"
    assert 'have 3 and 4 channels' in refused(root, unchanged)


@pytest.mark.parametrize('kind', ['ImageNet', 'mmpretrain.ImageNet'])
def test_where_imagenet_should_be(root, kind):
    more = (
        f"for part in (train_dataloader, val_dataloader):\n    part['dataset'] = dict("
        f"type={kind!r}, data_root='nowhere', split='val', pipeline=test_pipeline)\n"
    )
    with pytest.raises(UsageError) as error:
        check_datasets(config(root, more))
    text = str(error.value)
    assert 'nowhere/val' in text and 'IMAGENET_ROOT' in text


def test_folders_in_the_root(root):
    more = (
        "train_dataloader['dataset'] = dict(type='CustomDataset', "
        f'data_root={str(root / "train")!r}, pipeline=train_pipeline)'
    )
    check_datasets(config(root, more))
    shutil.rmtree(root / 'train')
    with pytest.raises(UsageError, match='no data'):
        check_datasets(config(root, more))


def test_two_norms(root):
    with pytest.raises(UsageError, match='set model.backbone.out_norm=False'):
        config(root, "model['backbone'].pop('out_norm')")


def test_more_classes_than_there_are(root):
    text = refused(root, 'val_evaluator.update(topk=(1, 5))')
    assert text.startswith('val_evaluator counts whether the true class is among')
    assert 'the first 5, and the model knows 3: set val_evaluator.topk' in text


def test_sizes_of_images(root):
    cfg = config(root)
    assert {batch[1:] for batch in training_batches(cfg)} == {(32, 32)}
    assert {batch[1:] for batch in inference_batches(cfg)} == {(32, 32)}
    cfg = config(root, 'test_pipeline.pop(2)')
    assert (2, 36, 36) in inference_batches(cfg)
    assert (1, 36, 36) in inference_batches(cfg)
    assert (2, 36, 120) in inference_batches(cfg)


def error_of(cfg):
    with DefaultScope.overwrite_default_scope(scope_of(cfg)):
        model = MODELS.build(cfg.model)
        return _find_error(model, cfg, 1), model


@pytest.mark.parametrize('family', PARTS)
def test_the_model_check_takes_every_family(root, family, monkeypatch):
    cfg = config(root, family=family)
    said, _ = error_of(cfg)
    assert said == ''


def test_the_model_check_looks_into_mesa(root, monkeypatch):
    seen = []
    monkeypatch.setattr(
        'mmvssm.engine.model_check.check.look',
        lambda *args: seen.append(look(*args)) or seen[-1],
    )
    more = "model.update(type='mmvssm.MESAClassifier', ratio=1.0, begin=0)"
    said, model = error_of(config(root, more, family='mlla'))
    assert said == '' and seen[0].all_used and not seen[0].idle
    # The model itself still asks for its hook.
    assert not model.has_hook


@pytest.mark.parametrize('family', PARTS)
def test_channels_of_the_head(root, family):
    said, model = error_of(
        config(root, "model['head'].update(in_channels=24)", family=family)
    )
    channels = model.backbone.out_channels[-1]
    assert f'the last map of the backbone has {channels} channels' in said
    assert said.endswith(f'set model.head.in_channels={channels}.')


@pytest.mark.parametrize(
    'more, words',
    [
        (
            "model['head'].update(in_chanels=16)",
            "model.head: mmvssm.PooledClsHead takes no 'in_chanels'; did you mean "
            "'in_channels'?",
        ),
        (
            "model['head'].pop('in_channels')",
            'model.head: mmvssm.PooledClsHead is missing 1 required positional '
            "argument: 'in_channels'.",
        ),
        (
            "model['head'].update(los=dict())",
            "model.head: mmvssm.PooledClsHead takes no 'los'; did you mean 'loss'?",
        ),
        (
            "model['head'].update(type='PooledClsHead')",
            "'PooledClsHead' is not in mmpretrain's model registry; did you mean "
            "'mmvssm.PooledClsHead'?",
        ),
    ],
)
def test_mistakes_in_a_head(root, more, words):
    cfg = config(root, more)
    with (
        DefaultScope.overwrite_default_scope('mmpretrain'),
        pytest.raises((TypeError, KeyError)) as error,
    ):
        Runner.build_model(None, cfg.model)
    assert words in explain(error.value, cfg)


def test_a_map_that_the_head_does_not_use(root, caplog):
    from torch.nn.parallel import DistributedDataParallel

    more = "model['backbone'].update(out_indices=(0, 1), out_norm=True)\n"
    more += "model['head'].update(type='LinearClsHead')\n"
    more += "model['neck'] = dict(type='GlobalAveragePooling')\n"
    cfg = config(root, more)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg.model)

        class Wrapped(DistributedDataParallel):
            """Of one process, without a group."""

            def __init__(self, module):
                torch.nn.Module.__init__(self)
                self.module = module
                self.find_unused_parameters = False

        said = _find_error(Wrapped(model), cfg, 1)
    assert 'no loss depends on map 0 of model.backbone.out_indices=(0, 1)' in said
    assert 'set model.backbone.out_indices=(1,).' in said
