"""Gradients of several batches in one step, and averages of the weights."""

import shutil

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook

import mmvssm
from mmvssm import engine
from mmvssm.compat import allow_mmengine_checkpoints
from tiny import REPO, write_ade, write_config
from toy import same_bits

pytest.importorskip('mmseg')

GROUP_NORM = "type='GN', num_groups=4, requires_grad=True"
_CONSTANT = """
train_dataloader.update(sampler=dict(shuffle=False))
param_scheduler = []
default_hooks['checkpoint'].update(interval=3)
"""
_SGD = """
optim_wrapper = dict(optimizer=dict(
    _delete_=True, type='SGD', lr=0.05, momentum=0.9, weight_decay=0.01))
"""
MOMENTUM = 0.3
_EMA = f"""
custom_hooks = [dict(type='EMAHook', momentum={MOMENTUM})]
optim_wrapper = dict(optimizer=dict(lr=1e-2))
train_cfg = dict(max_iters=6, val_interval=6)
"""


@pytest.fixture(scope='module', autouse=True)
def plain_text():
    """Do without laying out the text of configs nicely, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            'yapf.yapflib.yapf_api.FormatCode', lambda text, **options: (text, True)
        )
        yield


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp('averaging')
    write_ade(work / 'ade', train=8, val=2)
    return work


def read(path):
    # mmengine's loader takes back what is allowed to be read.
    allow_mmengine_checkpoints()
    return torch.load(path)


def train(work, name, base, recipe, *hooks, **changes):
    """Train in this process; returns the runner."""
    path = write_config(
        work / f'{name}.py', work / 'ade', _CONSTANT + recipe, GROUP_NORM, base
    )
    cfg = engine.load_config(str(path), work_dir=str(work / name))
    cfg.merge_from_dict({'experiment_name': name, **changes})
    engine.prepare_launch(cfg, 'none')
    runner = engine.build_runner(cfg)
    for hook in hooks:
        runner.register_hook(hook, priority='LOWEST')
    runner.train()
    return runner


def test_eight_batches_make_the_step_of_one_eight_times_as_large(work):
    """Up to the order in which images are added up."""
    whole = train(
        work,
        'whole',
        'upernet_vmamba_t.py',
        _SGD + 'train_cfg = dict(max_iters=2)\n',
        **{'train_dataloader.batch_size': 8},
    )
    parts = train(
        work,
        'parts',
        'upernet_vmamba_t_accum8.py',
        _SGD + 'train_cfg = dict(max_iters=16)\n',
        **{'train_dataloader.batch_size': 1},
    )
    assert (whole.iter, parts.iter) == (2, 16)
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(
            parts.model.state_dict()[name], weight, rtol=1e-4, atol=1e-6, msg=name
        )
    # Fifteen batches are one step, and another makes the second.
    fifteen = read(work / 'parts/iter_15.pth')['state_dict']
    ended = parts.model.state_dict()
    moved = [not torch.equal(ended[name], fifteen[name]) for name in ended]
    assert sum(moved) > 0.9 * len(moved)


def test_schedule_of_accumulation_is_eight_times_as_long():
    plain, longer = (
        Config.fromfile(REPO / f'configs/upernet_vmamba_t{suffix}.py')
        for suffix in ('', '_accum8')
    )
    count = longer.optim_wrapper.accumulative_counts
    assert count * longer.train_dataloader.batch_size == 16
    for old, new in zip(plain.param_scheduler, longer.param_scheduler, strict=True):
        assert new.begin == count * old.begin and new.end == count * old.end
        times = {'begin', 'end'}
        assert {k: new[k] for k in new if k not in times} == {
            k: old[k] for k in old if k not in times
        }
    assert longer.train_cfg.max_iters == count * plain.train_cfg.max_iters
    assert longer.train_cfg.val_interval == count * plain.train_cfg.val_interval
    intervals = [x.default_hooks.checkpoint.interval for x in (plain, longer)]
    assert intervals[1] == count * intervals[0]
    assert longer.optim_wrapper.optimizer == plain.optim_wrapper.optimizer


class Average(Hook):
    """Average the weights by the formula, and look at what is validated."""

    average, raw, validated = None, None, None

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.raw = {k: v.clone() for k, v in runner.model.state_dict().items()}
        if self.average is None:
            self.average = self.raw
        self.average = {
            name: (1 - MOMENTUM) * value + MOMENTUM * self.raw[name]
            for name, value in self.average.items()
        }

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.validated = {k: v.clone() for k, v in runner.model.state_dict().items()}


@pytest.fixture(scope='module')
def averaged(work):
    """The hook, the runner and the last checkpoint of a training with EMA."""
    hook = Average()
    runner = train(work, 'ema', 'upernet_vmamba_t_ema.py', _EMA, hook)
    return hook, runner, read(work / 'ema/iter_6.pth')


def test_average_is_what_is_validated_and_saved(averaged):
    hook, runner, saved = averaged
    for name, value in hook.average.items():
        near = dict(rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(saved['state_dict'][name], value, **near)
        assert torch.equal(saved['ema_state_dict'][f'module.{name}'], hook.raw[name])
    assert same_bits(hook.validated, saved['state_dict'])
    assert same_bits(runner.model.state_dict(), hook.raw)
    distance = [(hook.raw[k] - hook.average[k]).abs().max() for k in hook.raw]
    assert max(distance) > 1e-3
    assert saved['ema_state_dict']['steps'] == 6


def test_resuming_ends_with_the_same_bits(work, averaged):
    saved = averaged[2]
    (work / 'ema_again').mkdir()
    shutil.copy(work / 'ema/iter_3.pth', work / 'ema_again')
    train(work, 'ema_again', 'upernet_vmamba_t_ema.py', _EMA, resume=True)
    again = read(work / 'ema_again/iter_6.pth')
    for part in ('state_dict', 'ema_state_dict'):
        assert same_bits(again[part], saved[part])
    before = read(work / 'ema/iter_3.pth')
    assert not same_bits(before['state_dict'], saved['state_dict'])


def test_averages_are_what_others_load(work, averaged):
    from mmseg.registry import MODELS

    _, runner, saved = averaged
    path = str(work / 'ema/iter_6.pth')
    model = MODELS.build({**runner.cfg.model, '_scope_': 'mmseg'})
    mmvssm.load_checkpoint(model, path)
    assert same_bits(model.state_dict(), saved['state_dict'])
    tested = MODELS.build({**runner.cfg.model, '_scope_': 'mmseg'})
    engine.load_weights(tested, path)
    for name, value in tested.backbone.state_dict().items():
        assert torch.equal(value, saved['state_dict'][f'backbone.{name}'])


def test_a_test_run_keeps_the_weights_it_was_given(work, averaged):
    """``tools/test.py`` runs the config's EMAHook, too."""
    _, runner, saved = averaged
    cfg = runner.cfg.copy()
    cfg.experiment_name = 'ema_test'
    tester = engine.build_runner(cfg)
    engine.load_weights(tester.model, str(work / 'ema/iter_6.pth'))
    hook = Average()
    hook.after_test_iter = lambda runner, **kwargs: hook.after_val_iter(runner, 0)
    tester.register_hook(hook)
    metrics = tester.test()
    weights = {k: v for k, v in hook.validated.items() if 'auxiliary' not in k}
    assert all(torch.equal(v, saved['state_dict'][k]) for k, v in weights.items())
    assert metrics['mIoU'] == runner.message_hub.get_scalar('val/mIoU').current()
