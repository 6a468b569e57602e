"""The rows of the ablations as classifiers."""

import runpy

import numpy as np
import pytest
from PIL import Image

from mmvssm.analysis import ablation as tables
from mmvssm.engine.configs import ablation
from tiny import REPO

SMALL = str(REPO / 'configs/_base_/ablation_quickstart_cls.py')
IMAGENET = str(REPO / 'configs/classification/vmamba_t_s1l8_in1k.py')


def rows(folder, *names):
    return ablation.select_rows(ablation.load_rows(REPO / 'configs' / folder), names)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Folders of classes in the layout of the quickstart."""
    root = tmp_path_factory.mktemp('classes')
    draw = np.random.default_rng(0)
    for split in ('train', 'val'):
        for number in range(7):
            folder = root / split / f'class_{number}'
            folder.mkdir(parents=True)
            for image in range(2):
                pixels = draw.integers(0, 256, (128, 128, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f'{image}.png')
    return root


def options(root):
    loaders = ('train_dataloader', 'test_dataloader')
    return [
        *(f'{loader}.dataset.data_root={root}' for loader in loaders),
        *('train_cfg.max_iters=2', 'param_scheduler=[]'),
        *('train_dataloader.batch_size=4', 'env_cfg.dist_cfg.backend=gloo'),
    ]


def options_of_classes(root):
    names = ','.join(f'class_{number}' for number in range(7))
    key = 'dataset.metainfo.classes'
    return [
        *options(root),
        *(f'{x}_dataloader.{key}=[{names}]' for x in ('train', 'test')),
    ]


def test_a_row_gets_the_published_training_of_imagenet():
    (row,) = rows('ablation_scan', 'bidi')
    cfg = ablation.row_config(row, IMAGENET)
    assert cfg.model.type == 'mmpretrain.ImageClassifier'
    assert cfg.model.backbone.arch.forward_type == 'v052d_noz'
    assert cfg.model.backbone.drop_path_rate == 0.2
    assert cfg.model.backbone.out_indices == (3,) and not cfg.model.backbone.out_norm
    assert (cfg.model.head.in_channels, cfg.model.head.num_classes) == (768, 1000)
    assert 'decode_head' not in cfg.model and 'tta_pipeline' not in cfg
    assert cfg.optim_wrapper.optimizer.lr == 1e-3
    assert [hook.type for hook in cfg.custom_hooks] == ['mmvssm.TimmEMAHook']
    assert ablation.usual_metric(cfg) == 'accuracy/top1'
    counted, segmentor = tables.count_row(cfg)
    assert segmentor is None
    table = tables.complexity_table([(row, (counted, segmentor))])
    assert '| 30.25 M | 30.2 M | 4.91 G | 4.91 G | - | - |' in table


@pytest.mark.parametrize(
    'folder,name,channels',
    [('ablation', 'rope', None), ('ablation', 'mlla_t', 256)]
    + [('ablation_scan', 'hilbert', 256)],
)
def test_rows_are_trained_and_tested(folder, name, channels, data, tmp_path):
    (row,) = rows(folder, name)
    cfg = ablation.row_config(row, SMALL, options_of_classes(data))
    assert cfg.model.head.num_classes == cfg.data_preprocessor.num_classes == 7
    assert channels is None or cfg.model.head.in_channels == channels
    ablation.claim_work_dir(tmp_path, cfg)
    found = ablation.train_row(row, cfg, 0, tmp_path)
    assert found['metric'] == 'accuracy/top1' and 0 <= found['value'] <= 100
    # 14 images.
    assert found['value'] * 14 / 100 == pytest.approx(
        round(found['value'] * 14 / 100), abs=1e-3
    )
    summary = tables.summarise([row], [found])
    assert 'accuracy/top1' in tables.result_table(summary, found['metric'])


def test_a_row_that_is_a_classifier_keeps_its_head(data, tmp_path):
    base = REPO / 'configs/classification/mambar_b_stage1_in1k.py'
    text = f"""
_base_ = {str(base)!r}
ablation = dict(order=0, row='Mean', paper=None)
model = dict(
    backbone=dict(registers=3),
    head=dict(num_registers=3, pooling='mean'))
"""
    (tmp_path / 'mean.py').write_text(text)
    (row,) = ablation.load_rows(tmp_path)
    cfg = ablation.row_config(row, SMALL, options_of_classes(data))
    head = cfg.model.head
    assert (head.type, head.pooling) == ('mmvssm.RegisterClsHead', 'mean')
    assert (head.in_channels, head.num_classes) == (64, 7)
    # What mixes the images of ImageNet is not the head's.
    assert cfg.model.data_preprocessor.num_classes == 7
    assert 'mixup' not in cfg.model.data_preprocessor and not cfg.custom_hooks
    found = ablation.train_row(row, cfg, 0, tmp_path / 'out')
    assert 0 <= found['value'] <= 100


def test_rows_with_heads_of_their_own_share_a_folder(data, tmp_path, monkeypatch):
    tool = str(REPO / 'tools/run_ablation.py')
    shape = ('model.backbone.arch.embed_dims=16', 'model.backbone.arch.depth=2')
    for name in ('baseline', 'class_token'):
        args = ('--configs', str(REPO / 'configs/ablation_registers'), '--rows', name)
        args += ('--data', SMALL, '--work-dir', str(tmp_path), '--cfg-options')
        monkeypatch.setattr(
            'sys.argv', [tool, *args, *shape, *options_of_classes(data)]
        )
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(tool, run_name='__main__')
        assert not stop.value.code
    table = (tmp_path / 'ablation.md').read_text()
    assert 'Mamba-R B' in table and 'a class token' in table
