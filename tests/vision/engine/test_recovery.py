"""Classifiers that are stopped, resumed, shared out, or diverge."""

import json
import re

import pytest
import torch

from tiny_cls import write_config, write_folders
from toy import environment, final_weights, same_bits, train_each, train_pair

# Random numbers wherever a recipe draws some: in transforms, mixing and dropped paths.
RECIPE = """
custom_imports = dict(imports=['toy'])
custom_hooks = [dict(type='ToyEvent')]
model['backbone'].update(drop_path_rate=0.3)
model['train_cfg'] = dict(
    augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)])
model['head']['loss'] = dict(
    type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')
train_pipeline[2:3] = [
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='ColorJitter', brightness=0.3, contrast=0.3, saturation=0.3),
    dict(type='RandomErasing', erase_prob=0.25, mode='rand')]
train_dataloader['dataset'].update(pipeline=train_pipeline)
optim_wrapper['optimizer'].update(lr=0.01)
optim_wrapper.update(clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=4),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=3,
         convert_to_iter_based=True)]
train_cfg.update(max_epochs=3)
default_hooks['checkpoint'].update(save_best='accuracy/top1', max_keep_ckpts=2)
randomness = dict(seed=3)
"""
AVERAGE = "custom_hooks += [dict(type='EMAHook', momentum=0.1)]\n"
SAMPLER = """
train_dataloader['sampler'] = dict(
    type='RepeatAugSampler', num_repeats=3, shuffle=True)
"""
WORKERS = 'train_dataloader.update(num_workers=2, persistent_workers=True)\n'
RESUME = ('--work-dir', 'out', '--resume', 'auto')
WHOLE = ('', '--work-dir', 'whole')


def write(folder, more=''):
    root = folder / 'data'
    if not root.exists():
        write_folders(root)
    return write_config(folder / 'toy_config.py', root, RECIPE + more)


@pytest.mark.parametrize(
    'more', [AVERAGE, SAMPLER + WORKERS], ids=['averages', 'repeats in workers']
)
def test_stopped_within_epochs_ends_with_the_same_bits(more, tmp_path):
    write(tmp_path, more)
    events = ('SIGTERM@4', 'SIGUSR1@12', '')
    whole, *parts = train_each(tmp_path, WHOLE, *[(event, *RESUME) for event in events])
    assert whole[0] == 0, whole[1]
    assert [code for code, _ in parts] == [75, 75, 0], parts[-1][1]
    for step, (_, log) in zip((4, 12), parts):
        assert f'stopped after iteration {step}' in log
    assert same_bits(final_weights(tmp_path), final_weights(tmp_path, 'whole'))
    (best,) = (tmp_path / 'out').glob('best_accuracy_top1_epoch_*.pth')
    saved = torch.load(tmp_path / 'out/epoch_3.pth', weights_only=False)
    assert saved['meta']['dataset_meta']['classes'] == ('blob', 'cross', 'stripe')
    # The weights moved up to the end.
    before = torch.load(tmp_path / 'out/epoch_2.pth', weights_only=False)
    assert not same_bits(saved['state_dict'], before['state_dict'])


def test_the_module_that_is_not_finite_is_named(tmp_path):
    write(tmp_path)
    ((code, log),) = train_each(tmp_path, ('module:head@3', '--work-dir', 'nan'))
    assert code == 2, log
    found = (
        r'iteration 3: loss nan for \S+/\d\.png, \S+/\d\.png; first in head \(Pooled'
    )
    assert re.search(found, log), log


def test_two_processes_and_shards(tmp_path):
    """They average gradients; in shards they train what they train without."""
    write(tmp_path, 'train_cfg.update(max_epochs=2)\n')
    options = ('toy_config.py', '--work-dir')
    strategy = ('--cfg-options', 'strategy.type=mmvssm.FSDPStrategy')
    both = {}
    for name, more in (('ddp', ()), ('fsdp', strategy)):
        (first, log), (second, other) = train_pair(
            tmp_path, *options, name, *more, **environment()
        )
        assert (first, second) == (0, 0), log + other
        both[name] = torch.load(tmp_path / name / 'epoch_2.pth', weights_only=False)
    whole, shards = (both[name]['state_dict'] for name in ('ddp', 'fsdp'))
    assert whole.keys() == shards.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], shards[name], rtol=1e-4, atol=1e-5)
    # Without shards it goes on from what was trained in shards.
    ((code, log),) = train_each(
        tmp_path,
        ('', '--work-dir', 'on', '--resume', 'fsdp/epoch_1.pth'),
    )
    assert code == 0, log
    assert 'resumed epoch: 1' in log


def test_a_test_on_two_processes(tmp_path):
    write(tmp_path, 'train_cfg.update(max_epochs=1)\n')
    ((code, log),) = train_each(tmp_path, ('', '--work-dir', 'out'))
    assert code == 0, log
    checkpoint = ('toy_config.py', 'out/epoch_1.pth', '--work-dir', 'two')
    ranks = train_pair(tmp_path, *checkpoint, tool='test.py', **environment())
    assert [code for code, _ in ranks] == [0, 0], ranks[0][1]
    report = json.loads((tmp_path / 'two/classes.json').read_text())
    assert [row['images'] for row in report['classes']] == [2, 2, 2]
