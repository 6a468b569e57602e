"""With a seed and torch's deterministic algorithms two runs give the same bits."""

import pytest
from mmengine.config import Config

import mmvssm  # noqa: F401  makes 'mmvssm::' known
from tiny import REPO, shrink, write_ade
from tiny_det import needs_detection, write_coco
from tiny_det import write_config as write_detector
from toy import final_weights, same_bits, train_each

FAMILIES = ('vmamba_t', 'vim_t', 'mambar_s', 'mlla_t')
MORE = dict(
    custom_imports=dict(imports=['toy']),
    custom_hooks=[dict(type='ToyEvent')],
    randomness=dict(seed=5, deterministic=True),
)


def write_segmentor(folder, family):
    """The published settings, augmentation included, made small."""
    cfg = shrink(Config.fromfile(REPO / f'configs/upernet_{family}.py'))
    cfg.merge_from_dict(MORE)
    cfg.model.data_preprocessor.size = (64, 64)
    for step in cfg.train_dataloader.dataset.pipeline:
        if 'crop_size' in step:
            step.crop_size = (64, 64)
        elif step.type == 'RandomResize':
            step.scale = (96, 64)
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = str(folder / 'ade')
    cfg.train_cfg.update(max_iters=2, val_interval=100)
    # What ends with a validation otherwise.
    cfg.update(val_dataloader=None, val_cfg=None, val_evaluator=None)
    cfg.default_hooks.checkpoint.update(save_best=None, interval=100, save_last=False)
    cfg.dump(folder / f'{family}.py')


def check_pairs(folder, *configs):
    """Train each twice, and the last with another seed."""
    runs = [('', '--work-dir', f'{config}.{i}') for config in configs for i in (0, 1)]
    runs.append(('', '--work-dir', 'other', '--cfg-options', 'randomness.seed=6'))
    paths = [f'{config}.py' for config in configs for _ in (0, 1)]
    for code, log in train_each(folder, *runs, configs=[*paths, paths[-1]]):
        assert code == 0, log
        assert 'deterministic: True' in log
    for config in configs:
        first, second = (final_weights(folder, f'{config}.{i}') for i in (0, 1))
        assert same_bits(first, second), config
    assert not same_bits(final_weights(folder, 'other'), first)


def test_segmentors_of_all_families(tmp_path):
    pytest.importorskip('mmseg')
    write_ade(tmp_path / 'ade')
    for family in FAMILIES:
        write_segmentor(tmp_path, family)
    check_pairs(tmp_path, *FAMILIES)


@needs_detection
def test_detector(tmp_path):
    write_coco(tmp_path / 'coco', train=2)
    write_detector(tmp_path / 'detector.py', tmp_path / 'coco')
    cfg = Config.fromfile(tmp_path / 'detector.py')
    cfg.merge_from_dict(MORE)
    cfg.update(val_dataloader=None, val_cfg=None, val_evaluator=None)
    cfg.dump(tmp_path / 'detector.py')
    check_pairs(tmp_path, 'detector')
