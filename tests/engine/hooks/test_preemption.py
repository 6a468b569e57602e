"""What a signal does where no whole training is needed; test_recovery.py has those."""

import logging
import os
import signal
import threading
from types import SimpleNamespace

import pytest
from mmengine.hooks import EMAHook

from mmvssm.engine import PreemptionHook, SafeCheckpointHook
from mmvssm.engine.hooks import preemption
from toy import wait

TERM = signal.SIGTERM


@pytest.fixture
def codes(monkeypatch):
    """Exit codes of a process that goes on all the same."""
    codes = []
    monkeypatch.setattr(os, '_exit', codes.append)
    monkeypatch.setattr(logging, 'shutdown', lambda: None)
    monkeypatch.setattr(preemption, '_PATIENCE', 0.01)
    return codes


@pytest.fixture
def in_training():
    """A hook whose training has begun with iteration 5, and its runner."""
    hook, saver = PreemptionHook(), SafeCheckpointHook()
    saver._saved_iter = 5
    runner = SimpleNamespace(hooks=[hook, saver], iter=5, logger=logging.getLogger())
    before = signal.getsignal(TERM)
    hook.before_train(runner)
    assert signal.getsignal(TERM) == hook._note
    yield hook, runner
    hook.after_run(runner)
    assert signal.getsignal(TERM) is before
    # Nothing of it ends a process that goes on to something else.
    wait(lambda: not any(isinstance(t, threading.Timer) for t in threading.enumerate()))


def of_several_ranks(hook):
    hook.ranks = SimpleNamespace(group='all', any=lambda flag: flag)


def after_patience():
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer) and thread.interval < 1:
            thread.join()


def test_before_a_training_and_in_a_test_signals_mean_what_they_meant():
    hook, before = PreemptionHook(), signal.getsignal(TERM)
    hook.before_run(None)
    hook.before_test(None)
    hook.before_val(None)
    hook.after_val_iter(None)
    hook.after_val(None)
    assert signal.getsignal(TERM) is before
    hook.after_run(None)
    assert signal.getsignal(TERM) is before


def test_alone_it_ends_at_once(in_training, codes, caplog):
    signal.raise_signal(TERM)
    assert codes == [75]
    assert 'stopped after iteration 5: SIGTERM' in caplog.text


def test_ranks_that_cannot_agree_end_later(in_training, codes):
    hook, _ = in_training
    of_several_ranks(hook)
    signal.raise_signal(TERM)
    wait(lambda: codes)
    assert codes == [75]


@pytest.mark.parametrize(
    ('where', 'several'),
    [
        ('within', False),
        ('within', True),
        ('behind', False),
        ('behind', True),
        # Several agree after an image; one process alone ends there at once.
        ('validation', True),
    ],
)
def test_what_would_be_lost_is_finished_first(where, several, in_training, codes):
    hook, runner = in_training
    if several:
        of_several_ranks(hook)
    if where == 'validation':
        hook.before_val(runner)
    else:
        hook.before_train_iter(runner)
    if where == 'behind':
        runner.optim_wrapper = None
        hook.after_train_iter(runner)
    signal.raise_signal(TERM)
    after_patience()
    assert (codes, hook.reason) == ([], 'SIGTERM')


@pytest.mark.parametrize('writing', [False, True])
def test_data_that_never_comes_is_not_waited_for(
    writing, in_training, codes, caplog, monkeypatch
):
    monkeypatch.setattr(preemption, '_PATIENCE_WITH_DATA', 0.01)
    hook, runner = in_training
    runner.optim_wrapper = None
    hook.before_train_iter(runner)
    hook.after_train_iter(runner)
    hook.saver.writing = writing
    signal.raise_signal(TERM)
    after_patience()
    assert codes == ([] if writing else [75])
    if not writing:
        assert 'stopped after iteration 6: SIGTERM, and no data in' in caplog.text


def test_worker_that_has_just_been_forked_is_not_meant(in_training, codes):
    hook, _ = in_training
    hook._pid -= 1
    signal.raise_signal(TERM)
    assert (codes, hook.reason) == ([], '')


@pytest.mark.parametrize('twice', [False, True])
def test_a_validation_of_both_copies_of_the_weights_ends_first(
    twice, in_training, monkeypatch
):
    """MMPretrain's EMAHook has two passes in one, and does not say which runs."""
    hook, runner = in_training
    done = []
    averages = EMAHook()
    averages.evaluate_on_origin = twice
    averages.after_val_epoch = lambda runner: done.append('swapped')
    runner.hooks.append(averages)
    runner.iter = 6  # Not saved.
    monkeypatch.setattr(hook, '_can_save', lambda runner: True)
    monkeypatch.setattr(hook.saver, 'save_now', lambda *args: done.append('saved'))
    monkeypatch.setattr(hook, '_stop', lambda *args: done.append('stopped'))
    hook.reason = 'SIGTERM'
    hook.after_val_iter(runner)
    assert done == ([] if twice else ['swapped', 'saved', 'stopped'])
