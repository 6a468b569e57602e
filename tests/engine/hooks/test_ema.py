"""Averages as timm's, in a toy training of three epochs of six batches."""

import shutil

import pytest
import torch
from mmengine.hooks import Hook

from mmvssm import engine
from mmvssm.checkpoints.read import read_state_dict
from mmvssm.compat import allow_mmengine_checkpoints
from mmvssm.engine import TimmEMAHook, UsageError
from toy import EPOCHS, same_bits, write_toy

DECAY, BASE = 0.7, 4
_MORE = (
    EPOCHS
    + f"""
custom_hooks = [dict(type='mmvssm.TimmEMAHook', decay={DECAY}, base_batch_size={BASE})]
train_cfg.update(max_epochs=3, val_interval=1)
default_hooks['checkpoint'].update(max_keep_ckpts=-1)
"""
)


class Watch(Hook):
    """Averages by the formula, and what is validated."""

    def __init__(self, decay, counts=1):
        self.decay, self.counts, self.done = decay, counts, 0

    def before_train(self, runner):
        self.average = self._look(runner)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.raw = self._look(runner)
        self.done += 1
        if self.done % self.counts == 0:
            for name, value in self.raw.items():
                average = self.average[name]
                if value.is_floating_point():
                    value = self.decay * average + (1 - self.decay) * value
                self.average[name] = value

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.validated = self._look(runner)

    def _look(self, runner):
        return {k: v.clone() for k, v in runner.model.state_dict().items()}


def train(folder, more='', *, counts=1, resume=None):
    """Train the toy in this process; returns what was watched and the runner."""
    folder.mkdir()
    work_dir = folder / 'out'
    if resume:
        work_dir.mkdir()
        shutil.copy(resume, work_dir)
    path = write_toy(folder, _MORE + more)
    cfg = engine.load_config(str(path), work_dir=str(work_dir))
    cfg.experiment_name = str(folder)
    cfg.resume = bool(resume)
    engine.prepare_launch(cfg, 'none')
    runner = engine.build_runner(cfg)
    # Two images of one process.
    watch = Watch(DECAY ** (2 * counts / BASE), counts)
    runner.register_hook(watch, priority='LOWEST')
    runner.train()
    return watch, runner


def read(path):
    allow_mmengine_checkpoints()
    return torch.load(path)


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.fixture(scope='module')
def average(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ema') / 'average'
    return folder, *train(folder)


@pytest.fixture(scope='module')
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ema') / 'raw'
    return folder, *train(folder, "custom_hooks[0].update(evaluate='raw')\n")


def without_counters(state):
    return {k: v for k, v in state.items() if 'num_batches' not in k}


def test_average_of_weights_and_statistics_is_validated_and_saved(average):
    folder, watch, runner = average
    saved = read(folder / 'out/epoch_3.pth')
    expected = without_counters(watch.average)
    assert 'norm.running_var' in expected
    close(without_counters(saved['state_dict']), expected)
    close(without_counters(watch.validated), expected)
    beside = saved['ema_state_dict']
    assert all(torch.equal(beside[f'module.{k}'], v) for k, v in watch.raw.items())
    assert same_bits(runner.model.state_dict(), watch.raw)
    apart = (watch.raw['norm.running_var'] - expected['norm.running_var']).abs().max()
    assert apart > 1e-4


def test_raw_weights_are_validated_and_saved(raw):
    folder, watch, _ = raw
    saved = read(folder / 'out/epoch_3.pth')
    assert same_bits(saved['state_dict'], watch.raw)
    assert same_bits(watch.validated, watch.raw)
    close(without_counters(saved['state_dict_ema']), without_counters(watch.average))
    assert 'ema_state_dict' not in saved
    # What --weights takes of it.
    keys = {None: 'state_dict', 'raw': 'state_dict', 'ema': 'state_dict_ema'}
    for copy, key in keys.items():
        assert same_bits(read_state_dict(folder / 'out/epoch_3.pth', copy), saved[key])


@pytest.mark.parametrize('kind', ['average', 'raw'])
def test_resuming_ends_with_the_same_bits(kind, tmp_path, request):
    folder, _, _ = request.getfixturevalue(kind)
    more = f'custom_hooks[0].update(evaluate={kind!r})\n'
    train(tmp_path / 'again', more, resume=folder / 'out/epoch_2.pth')
    once, again = (
        read(path / 'out/epoch_3.pth') for path in (folder, tmp_path / 'again')
    )
    for key in {'state_dict', 'ema_state_dict', 'state_dict_ema'} & set(once):
        # How many updates were counted is of no consequence but for the first.
        parts = [
            {k: v for k, v in x[key].items() if k != 'steps'} for x in (once, again)
        ]
        assert same_bits(*parts), key


@pytest.mark.parametrize('kind,other', [('average', 'raw'), ('raw', 'average')])
def test_resuming_with_the_other_weights_is_refused(kind, other, tmp_path, request):
    folder, _, _ = request.getfixturevalue(kind)
    more = f'custom_hooks[0].update(evaluate={other!r})\n'
    with pytest.raises(UsageError, match='whose training had another evaluate='):
        train(tmp_path / 'again', more, resume=folder / 'out/epoch_2.pth')


def test_added_batches_count_and_only_steps_are_averaged(tmp_path):
    more = 'optim_wrapper.update(accumulative_counts=3)\n'
    watch, runner = train(tmp_path / 'added', more, counts=3)
    saved = read(tmp_path / 'added/out/epoch_3.pth')
    close(without_counters(saved['state_dict']), without_counters(watch.average))


def test_statistics_of_several_processes_are_those_of_the_first(average, monkeypatch):
    _, _, runner = average
    (hook,) = (h for h in runner.hooks if isinstance(h, TimmEMAHook))
    model = hook.ema_model.module
    before = {k: v.clone() for k, v in model.state_dict().items()}
    monkeypatch.setattr('mmvssm.engine.hooks.ema.get_world_size', lambda: 2)
    sent = []

    def broadcast(values):
        sent.append(values.clone())
        values += 1

    monkeypatch.setattr('mmvssm.engine.hooks.ema.broadcast', broadcast)
    hook.after_train_iter(runner, 0)
    assert len(sent) == 1
    statistics = {'norm.running_mean', 'norm.running_var', 'ballast'}
    weights = dict(model.named_parameters())
    kept = hook.decay_with(2)
    for name, value in without_counters(model.state_dict()).items():
        raw = runner.model.state_dict()[name]
        expected = kept * before[name] + (1 - kept) * raw
        assert (name in statistics) != (name in weights)
        torch.testing.assert_close(value, expected + (name in statistics))
    model.load_state_dict(before)


def test_a_test_behind_the_training_is_of_the_average(average):
    _, watch, runner = average
    watch.after_test_iter = lambda runner, **kwargs: watch.after_val_iter(runner, 0)
    watch.validated = None
    runner._test_loop = dict(type='TestLoop')
    runner._test_dataloader = runner.cfg.val_dataloader
    runner._test_evaluator = runner.cfg.val_evaluator
    runner.test()
    close(without_counters(watch.validated), without_counters(watch.average))


@pytest.mark.parametrize('options', [dict(decay=1.0), dict(evaluate='both')])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match='TimmEMAHook takes a decay between 0 and 1'):
        TimmEMAHook(**options)


def test_published_decays_of_mlla():
    hook = TimmEMAHook(0.9996, 4096)
    decays = {4096: 0.9996, 1024: 0.9999, 512: 0.99995}
    for batch, decay in decays.items():
        assert hook.decay_with(batch) == pytest.approx(decay, abs=1e-7)
